"""The evaluation of trained models, and its command."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from lodestar.distributed.testing import run_world
from lodestar.errors import ModelError
from retrieval.embedding import distributed_embed
from retrieval.embedding.distributed_embed import embed
from retrieval.embedding.exact_search import search
from retrieval.embedding.load_model import load_model
from retrieval.evaluation.beir import Beir, read_beir
from retrieval.evaluation.bm25 import rank_bm25
from retrieval.evaluation.cli import main
from retrieval.evaluation.compare import compare
from retrieval.evaluation.metrics import evaluate_run
from retrieval.evaluation.tasks import TaskResult, retrieval_task
from tests import tiny

CPU = torch.device("cpu")
TEXTS = tiny.texts(7, seed=5)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    return tiny.trained(root / "model", root / "plain")


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    return tiny.beir_folder(tmp_path / "words")


def recipe(folder: Path, **values: object) -> str:
    path = folder / "evaluate.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


def evaluate_model(folder: Path, beir: Beir) -> TaskResult:
    return retrieval_task(beir).measure(partial(embed, load_model(folder, CPU)), CPU)


def test_embeddings_are_the_cls_vectors_in_the_order_of_the_texts_with_the_query_prompt(model_folder):
    from transformers import AutoModel, AutoTokenizer

    encoder, tokenizer = AutoModel.from_pretrained(model_folder).eval(), AutoTokenizer.from_pretrained(model_folder)
    for role, prompt in (("query", "search "), ("document", "")):
        got = embed(load_model(model_folder, CPU), TEXTS, role, batch_tokens=32)
        for row, text in zip(got, TEXTS, strict=True):  # one at a time: no padding, no sorting
            with torch.no_grad():
                cls = encoder(
                    **tokenizer(prompt + text, truncation=True, max_length=32, return_tensors="pt")
                ).last_hidden_state[0, 0]
            expected = torch.nn.functional.normalize(cls, dim=0)
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)  # batches change the order of sums


def test_a_model_is_measured_as_its_embeddings_are(model_folder, beir_folder):
    beir = read_beir(beir_folder, "test")
    found = evaluate_model(model_folder, beir)
    model = load_model(model_folder, CPU)
    expected = evaluate_run(
        beir, *search(embed(model, beir.queries, "query"), embed(model, beir.documents, "document"), 100)
    )
    assert found.metrics == expected
    assert found.retrieval.ranking.scores_QK.shape == found.retrieval.ranking.index_QK.shape == (12, 12)


def test_models_stand_beside_bm25_and_the_last_is_mixed_with_it(model_folder, beir_folder):
    beir = read_beir(beir_folder, "test")
    rows = compare({"first": model_folder, "last": model_folder}, beir, device=CPU)
    assert [row["model"] for row in rows] == ["BM25", "first", "last", "last + BM25"]
    assert rows[0] == {"model": "BM25", **evaluate_run(beir, *rank_bm25(beir, 100))}
    assert {**rows[1], "model": ""} == {**rows[2], "model": ""} != {**rows[3], "model": ""}
    assert [row["model"] for row in compare({"only": model_folder}, beir, device=CPU, bm25=False)] == ["only"]


def test_the_door_prints_a_table_and_writes_one_json(model_folder, beir_folder, tmp_path, capsys):
    config = recipe(tmp_path, models={"mine": str(model_folder)}, evaluate={"data": str(beir_folder)}, device="cpu")
    assert main(["--config", config, f"output_dir={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("nDCG@10", "recall@100", "BM25", "mine", "12 queries, 12 documents"))
    written = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (written["evaluation"], written["split"], written["queries"]) == ("words", "test", 12)
    assert [row["model"] for row in written["rows"]] == ["BM25", "mine", "mine + BM25"]
    assert 0 < written["rows"][0]["map_at_100"] <= 1


def test_an_interrupted_run_goes_on_with_the_embeddings_it_has(
    model_folder, beir_folder, tmp_path, monkeypatch, capsys
):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    (damaged / "config.json").write_text((damaged / "config.json").read_text() + " ")  # else it is the same model
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:99])
    models = {"first": str(model_folder), "second": str(damaged)}
    config = recipe(tmp_path, models=models, evaluate={"data": str(beir_folder)}, device="cpu")
    options = ["--config", config, f"output_dir={tmp_path / 'out'}"]
    assert main(options) == 2
    assert len(list(tmp_path.glob("out/embeddings.work/*/*.safetensors"))) == 2  # queries and documents of the first

    (damaged / "model.safetensors").write_bytes(weights)
    embedded, really = [], distributed_embed.encode_texts
    monkeypatch.setattr(
        distributed_embed, "encode_texts", lambda *args, **options: embedded.append(args) or really(*args, **options)
    )
    assert main(options) == 0
    assert len(embedded) == 2  # of the second
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["rows"]
    assert {**rows[1], "model": ""} == {**rows[2], "model": ""}
    assert not (tmp_path / "out/embeddings.work").exists()
    assert "damaged: cannot be opened" in capsys.readouterr().err


def test_a_plan_counts_texts_and_opens_no_model(beir_folder, tmp_path, capsys):
    config = recipe(tmp_path, models=["no/such/model"], evaluate={"data": str(beir_folder)})
    assert main(["--config", config, "--plan", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["world_size"], plan["queries"], plan["documents"], plan["texts_per_rank"]) == (4, 12, 12, 6)


def test_more_ranks_than_texts_measure_what_one_does(model_folder, tmp_path):
    folder = tiny.beir_folder(tmp_path / "one", count=2)
    (alone,) = run_world(_measured, 1, model_folder, folder)
    assert all(found == pytest.approx(alone) for found in run_world(_measured, 3, model_folder, folder))


def _measured(_rank, _world_size, model_folder, folder):
    return evaluate_model(model_folder, read_beir(folder)).metrics


def test_prompts_stand_in_for_a_models_own_by_its_label(model_folder, beir_folder, tmp_path, capsys):
    models = {"own": str(model_folder), "other": str(model_folder)}
    values = {"models": models, "evaluate": {"data": str(beir_folder)}, "device": "cpu", "output_dir": str(tmp_path)}
    assert main(["--config", recipe(tmp_path, **values, prompts={"other": {"query": "the vector of "}})]) == 0
    _, own, other, _ = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert {**own, "model": ""} != {**other, "model": ""}
    assert main(["--config", recipe(tmp_path, **values, prompts={"another": {"query": ""}})]) == 2
    assert "prompts.another: no model has that label (known: own, other)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"models": []}, "evaluate.yaml:1: models: must"),
        ({"evaluate": {}}, "needs evaluate.data (name a BEIR folder)"),
        ({"models": ["./absent"]}, "./absent: no such folder (name a sentence-transformers folder"),
        ({"models": ["runs/absent/model"]}, "runs/absent/model: no such folder"),
        ({"evaluate": {"data": "absent"}}, "absent: no such folder (name one with corpus.jsonl"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(beir_folder, tmp_path, capsys, values, complaint):
    usual = {"models": ["./absent"], "evaluate": {"data": str(beir_folder)}, "bm25": False, "device": "cpu"}
    assert main(["--config", recipe(tmp_path, **{**usual, **values})]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and complaint in told and told.count("\n") == 1


def test_a_bare_encoder_is_refused_because_its_pooling_would_be_guessed(model_folder):
    with pytest.raises(ModelError, match=r"no modules\.json there"):
        load_model(model_folder.parent / "plain", CPU)


def test_a_folder_without_one_of_its_tensors_is_refused_and_one_without_a_pooler_is_not(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "copy"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    without_pooler = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(without_pooler, folder / "model.safetensors", {"format": "pt"})
    expected = embed(load_model(model_folder, CPU), TEXTS, "document")
    assert torch.equal(embed(load_model(folder, CPU), TEXTS, "document"), expected)
    without_pooler.pop("encoder.layer.1.output.dense.bias")
    save_file(without_pooler, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.1\.output\.dense\.bias not in its files"):
        load_model(folder, CPU)


def test_embeddings_that_are_not_numbers_are_an_error_not_a_low_score(model_folder):
    model = load_model(model_folder, CPU)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="not all are finite"):
        embed(model, TEXTS, "document")
