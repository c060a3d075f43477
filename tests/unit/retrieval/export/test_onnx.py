"""ONNX files beside the model they came from, used as docs/deploy.md says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from lodestar.errors import ModelError
from retrieval.embedding.embedder import Embedder
from retrieval.export import onnx
from retrieval.export.cli import export_main
from tests import pages, tiny

ROOT = Path(__file__).parents[4]
ort = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


def model_folder(
    root: Path, family: str, *, width: int = 32, pooling: Any = "cls", include_prompt: bool = True
) -> Path:
    # ModernBERT's second layer is the first with local attention
    plain = tiny.encoder(root / "plain", family, width=width, std=0.1, layers=2 if family == "modernbert" else 1)
    if family == "bert":  # as BERT's own tokenizer does
        path = plain / "tokenizer_config.json"
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    encoder = Transformer(str(plain), max_seq_length=32)
    modules = [encoder, Pooling(width, pooling_mode=pooling, include_prompt=include_prompt), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "search ", "document": ""}, device="cpu")
    model.save(str(root / "model"))
    return root / "model"


PARAMS = [pytest.param(family, marks=() if family == "bert" else pytest.mark.slow) for family in tiny.FAMILIES]


@pytest.fixture(scope="module", params=PARAMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Any]:
    """(family, model, exported folder, its files); bert is larger, modernbert has its weights in a second file."""
    family: str = request.param
    root = tmp_path_factory.mktemp(family)
    model = model_folder(root, family, width=256 if family == "bert" else 32)
    with pytest.MonkeyPatch.context() as patch:
        if family == "modernbert":
            patch.setattr(onnx, "ONE_FILE_BYTES", 0)
        return family, model, root / "onnx", onnx.export_onnx(model, root / "onnx", int8=family != "xlm-roberta")


def documented_embed(folder: Path, file: str = "model.onnx") -> Any:
    """`embed` of the example in docs/deploy.md, executed on `folder`."""
    (example,) = pages.blocks("deploy.md", "ONNX")
    assert "runs/demo/onnx" in example and "torch" not in example and "/model.onnx" in example
    scope: dict[str, Any] = {}
    exec(example.replace("runs/demo/onnx", str(folder)).replace("/model.onnx", f"/{file}"), scope)
    assert scope["scores"].shape == (1, 2)
    return scope["embed"]


BATCHES = [
    ["mask"],
    tiny.texts(2, seed=1),
    tiny.texts(17, seed=2),
    ["", "Rank the ROWS", "mask " * 100],
    ["mask " * 100],
]


def test_the_documented_example_gives_the_embedders_embeddings_at_any_shape(exported: Any) -> None:
    _, model, folder, files = exported
    embed, embedder = documented_embed(folder), Embedder(model)
    assert files["model.onnx"].largest_difference < 1e-5
    for texts in BATCHES:
        queries = embed(texts, "query")
        np.testing.assert_allclose(queries, embedder.encode_queries(texts), atol=1e-5)
        np.testing.assert_allclose(embed(texts, "document"), embedder.encode_documents(texts), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    assert not np.allclose(embed(BATCHES[2], "query"), embed(BATCHES[2], "document"), atol=1e-3)


def test_the_folder_says_how_to_use_it(exported: Any) -> None:
    family, _, folder, _ = exported
    about = json.loads((folder / "embedding.json").read_text())
    width = 256 if family == "bert" else 32
    assert about == {
        "max_length": 32, "width": width, "pooling": "cls", "normalised": True,
        "prompts": {"query": "search ", "document": ""},
    }  # fmt: skip
    names = {path.name for path in folder.iterdir()}
    written = {"model.onnx", "embedding.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    more = {"bert": {"model_int8.onnx"}, "modernbert": {"model_int8.onnx", "model.onnx.data"}, "xlm-roberta": set()}
    assert names == written | more[family]
    session = ort.InferenceSession(folder / "model.onnx")
    inputs = {argument.name: argument.shape for argument in session.get_inputs()}
    assert ("token_type_ids" in inputs) == (family == "bert")
    assert all(shape == ["batch", "length"] for shape in inputs.values())
    outputs = {argument.name: argument.shape for argument in session.get_outputs()}
    assert outputs == {"sentence_embedding": ["batch", width], "last_hidden_state": ["batch", "length", width]}


@pytest.mark.parametrize("exported", ["bert"], indirect=True)
def test_int8_is_near_fp32_and_about_a_quarter_of_it(exported: Any) -> None:
    _, _, folder, files = exported
    texts = tiny.texts(30, seed=4)
    fp32, int8 = (documented_embed(folder, name)(texts, "query") for name in ("model.onnx", "model_int8.onnx"))
    cosine = int8 @ fp32.T
    assert cosine.diagonal().min() > 0.98
    assert not np.allclose(fp32, int8, atol=1e-4)
    assert (cosine.argmax(1) == np.arange(30)).all() and np.median(cosine) < 0.95  # other texts are further
    assert 0.2 < files["model_int8.onnx"].bytes / files["model.onnx"].bytes < 0.33
    assert files["model_int8.onnx"].bytes == (folder / "model_int8.onnx").stat().st_size


@pytest.mark.parametrize("exported", ["xlm-roberta"], indirect=True)
def test_an_export_that_differs_is_refused_and_leaves_no_folder(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _, folder, _ = exported
    other = model_folder(tmp_path, family, pooling="mean")
    monkeypatch.setattr(onnx, "_write_fp32", lambda path, model, file: shutil.copy(folder / "model.onnx", file))
    with pytest.raises(ModelError, match="embeddings differ by"):
        onnx.export_onnx(other, tmp_path / "onnx", int8=False)
    assert not (tmp_path / "onnx").exists()


def test_a_decoder_is_exported_with_its_last_token(tmp_path: Path) -> None:
    """The model pads its texts on the left, the export on the right."""
    encoder = Transformer(str(tiny.decoder(tmp_path / "plain")), max_seq_length=32)
    modules = [encoder, Pooling(32, pooling_mode="lasttoken"), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": "", "document": ""}, device="cpu")
    assert model.tokenizer.padding_side == "left"
    model.save(str(tmp_path / "model"))
    files = onnx.export_onnx(tmp_path / "model", tmp_path / "onnx", int8=False)
    assert files["model.onnx"].largest_difference < 1e-5
    assert json.loads((tmp_path / "onnx/embedding.json").read_text())["pooling"] == "lasttoken"


def test_pooling_that_needs_more_than_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="leaves out the prompt"):
        onnx.export_onnx(model_folder(tmp_path, "bert", include_prompt=False), tmp_path / "onnx")


def test_the_command_plans_and_tells_each_mistake_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "configs/export/onnx.yaml")
    model, output = tiny.trained(tmp_path / "model", tmp_path / "plain"), tmp_path / "onnx"
    argv = ["--config", recipe, f"model={model}", f"output={output}"]
    assert export_main([*argv, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"].startswith("model.onnx, model_int8.onnx, ")
    assert not output.exists()
    for overrides, complaint in (
        ([f"output={tmp_path}"], f"output: {tmp_path}: already exists"),
        (["int8=yes"], "int8: must be"),
        ([f"model={tmp_path / 'absent'}"], "absent: no such folder"),
    ):
        key = overrides[0].partition("=")[0]
        assert export_main([*(word for word in argv if not word.startswith(f"{key}=")), *overrides]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and complaint in message and message.count("\n") == 1
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    assert export_main(argv) == 2
    message = capsys.readouterr().err
    assert message == "error: onnx: onnxruntime is not installed (pip install 'lodestar-embeddings[onnx]')\n"
