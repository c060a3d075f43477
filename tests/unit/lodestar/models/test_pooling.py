"""The poolings beside those of sentence-transformers, and which one a run trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lodestar.config.loader import load
from lodestar.config.schema import ModelConfig
from lodestar.errors import ConfigError, ModelError
from lodestar.models.pooling import pool
from lodestar.models.pooling_config import CAUSAL_DECODERS, POOLINGS, pooling_on_disk, resolve_pooling
from retromae.config import PretrainRecipe
from tests import processes, tiny
from tests.distributed import steps


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pooling_is_that_of_sentence_transformers(mode: str, side: str) -> None:
    torch.manual_seed(0)
    hidden_BLD, lengths_B = torch.randn(5, 9, 16), torch.tensor([1, 9, 4, 8, 2])
    mask_BL = torch.arange(9) < lengths_B[:, None]
    if side == "left":
        if mode == "cls":
            pytest.skip("training pads on the right")
        mask_BL = mask_BL.flip(1)
    features = {"token_embeddings": hidden_BLD, "attention_mask": mask_BL.long()}
    expected_BD = Pooling(16, pooling_mode=mode)(features)["sentence_embedding"]  # type: ignore[arg-type]
    torch.testing.assert_close(pool(hidden_BLD, mask_BL, POOLINGS[mode]), expected_BD, rtol=0, atol=1e-6)
    others = [pool(hidden_BLD, mask_BL, other) for name, other in POOLINGS.items() if name != mode]
    assert not any(torch.allclose(expected_BD, other_BD, atol=1e-3) for other_BD in others)


def test_a_mean_in_half_precision_is_summed_in_fp32() -> None:
    hidden_BLD, mask_BL = torch.ones(1, 512, 1, dtype=torch.bfloat16), torch.ones(1, 512)
    hidden_BLD[0, 1:] = 1 / 256  # bf16 has 8 bits: each of these added to 1 would be lost
    mean_BD = pool(hidden_BLD, mask_BL, "mean")
    assert mean_BD.dtype == torch.float32 and mean_BD.item() == (1 + 511 / 256) / 512


OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}
CHOICES: list[tuple[dict[str, Any] | None, str]] = [
    (None, "cls"),
    ({"pooling_mode": "cls"}, "cls"),
    ({"pooling_mode": "mean"}, "mean"),
    ({"pooling_mode": ["mean"]}, "mean"),
    ({"pooling_mode": "lasttoken"}, "last_token"),
    ({**OLD, "pooling_mode_cls_token": True}, "cls"),
    ({**OLD, "pooling_mode_mean_tokens": True}, "mean"),
    ({**OLD, "pooling_mode_lasttoken": True}, "last_token"),
    ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, "mean"),  # as sentence-transformers reads both
    (OLD, "mean"),  # its default
    ({"pooling_mode": "max"}, "max"),
    ({"pooling_mode": ["cls", "mean"]}, "cls and mean"),
    ({**OLD, "pooling_mode_weightedmean_tokens": True}, "weightedmean"),
    ({**OLD, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls and mean"),
    ({"pooling_mode": "mean", "include_prompt": False}, r"mean \(without the prompt\)"),
]


@pytest.mark.parametrize(("values", "name"), CHOICES, ids=str)
def test_auto_is_the_folders_own_and_what_is_not_known_is_one_line(
    values: dict[str, Any] | None, name: str, tmp_path: Path
) -> None:
    if values is not None:
        tiny.with_pooling(tmp_path, **values)
    model = ModelConfig(encoder=str(tmp_path))
    if name in POOLINGS.values():
        reason = "names none" if values is None else "embeds"
        choice = resolve_pooling(model, tmp_path)
        assert choice.pooling == name and choice.reason.endswith(reason) and not choice.warnings
        return
    with pytest.raises(ModelError, match=f"^model.pooling: .*1_Pooling/config.json: {name} pooling cannot be trained"):
        resolve_pooling(model, tmp_path)
    named = resolve_pooling(ModelConfig(encoder=str(tmp_path), pooling="cls"), tmp_path)
    assert named.pooling == "cls" and len(named.warnings) == 1


def test_another_pooling_than_the_folders_own_is_warned_of_in_one_line(tmp_path: Path) -> None:
    model = ModelConfig(encoder=str(tmp_path), pooling="last_token")
    assert resolve_pooling(model, tmp_path) == ("last_token", "as the recipe says", ())  # the folder says nothing
    tiny.with_pooling(tmp_path, pooling_mode="mean")
    pooling, _, (warning,) = resolve_pooling(model, tmp_path)
    assert pooling == "last_token" and "\n" not in warning
    assert warning.startswith("warning: model.pooling: ") and "embeds by mean pooling" in warning
    assert not resolve_pooling(model.model_copy(update={"pooling": "mean"}), tmp_path).warnings
    (tmp_path / "1_Pooling/config.json").write_text("{")
    with pytest.raises(ModelError, match=r"1_Pooling/config.json: not valid JSON"):
        resolve_pooling(model, tmp_path)


def test_a_causal_decoder_is_known_by_its_configuration(tmp_path: Path) -> None:
    """Where that asks for bidirectional attention, loading it finds out whether transformers gives it."""
    for values, is_causal in (
        ({"model_type": "qwen2"}, True),
        ({"model_type": "bert", "is_decoder": True}, True),
        ({"model_type": "bert"}, False),
        ({"model_type": "qwen2", "is_causal": False}, False),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = ModelConfig(encoder=str(tmp_path), pooling="last_token")
        assert resolve_pooling(model, tmp_path).pooling == "last_token"
        for pooling in ("auto", "cls", "mean"):
            model = model.model_copy(update={"pooling": pooling})
            if is_causal:
                with pytest.raises(ModelError, match="is a causal decoder"):
                    resolve_pooling(model, tmp_path)
            else:
                resolve_pooling(model, tmp_path)


def test_the_causal_decoders_are_those_of_transformers() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) >= CAUSAL_DECODERS
    assert not CAUSAL_DECODERS & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def test_a_hub_name_that_is_not_on_this_machine_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pooling_on_disk(ModelConfig(encoder="nobody/nothing")) is None


def test_a_causal_decoder_ends_a_run_before_torch_is_loaded(tmp_path: Path) -> None:
    steps.recipe("finetune", tmp_path)
    config = tmp_path / "bert/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_decoder": True}))
    program = (
        "import sys; from contrastive.cli import main\n"
        f"code = main(['--config', '{tmp_path}/finetune.yaml']); print(code, 'torch' in sys.modules)"
    )
    ended = processes.run([sys.executable, "-c", program], limit_s=120)
    assert ended.stdout.split() == ["2", "False"]
    assert ended.stderr.startswith(f"error: {tmp_path}/finetune.yaml:3: model.encoder: ")
    assert ended.stderr.count("\n") == 1


def test_stage_1_names_no_other_pooling_than_cls(tmp_path: Path) -> None:
    assert steps.recipe("pretrain", tmp_path).model.pooling == "cls"
    assert steps.recipe("pretrain", tmp_path, "model.pooling=auto").model.pooling == "cls"
    file = tmp_path / "pretrain.yaml"
    file.write_text(file.read_text().replace("max_length: 32", "max_length: 32, pooling: mean"))
    with pytest.raises(ConfigError, match=r"pretrain.yaml:3: model.pooling: mean: RetroMAE trains the \[CLS\] vector"):
        load(PretrainRecipe, file)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_plan_says_the_pooling(stage: str, tmp_path: Path) -> None:
    run_recipe = steps.recipe(stage, tmp_path)
    assert steps.planned(run_recipe)["pooling"] == "cls"
    tiny.with_pooling(tmp_path / "bert", pooling_mode="mean")
    plan = steps.planned(run_recipe)
    assert plan["pooling"] == {"pretrain": "cls", "finetune": "mean"}[stage]
    assert any("embeds by mean pooling" in line for line in plan["missing"]) == (stage == "pretrain")
    tiny.with_pooling(tmp_path / "bert", pooling_mode="max")
    missing = steps.planned(run_recipe)["missing"]
    assert any("max pooling" in line for line in missing)
