"""The reports of a training run and of an evaluation: what they show, that they stand alone, that texts stay texts."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lodestar.reporting.html import page
from lodestar.reporting.training_report import thinned, write_report
from retrieval.embedding.exact_search import search
from retrieval.evaluation import report as evaluation_report
from retrieval.evaluation.beir import Beir, read_beir
from retrieval.evaluation.cli import main
from retrieval.evaluation.metrics import evaluate_run
from retrieval.evaluation.report import Row, View, make_view
from retrieval.evaluation.tasks import RetrievalOutput
from tests import processes, tiny

HOSTILE = '<script>console.error("a text was run")</script><img src="http://example.org/x.png">'


# --- a training run --------------------------------------------------------------------------


def run_folder(folder: Path, steps: int = 40) -> Path:
    """As a run of stage 1 leaves it, with a spike of the loss, a null, and a step that was skipped."""
    folder.mkdir()
    lines: list[dict[str, object]] = [{"step": 0, "evaluation": "words", "ndcg_at_10": 0.1, "mrr_at_100": 0.05}]
    for step in range(1, steps + 1):
        parts = {"encoder_loss": 2.0 / step**0.2, "decoder_loss": None if step == 7 else 30.0 if step == 20 else 3.0}
        speed = {"samples_per_second": 90.0 + step % 3, "tokens_per_second": 900.0 + step % 5, "padding_share": 0.25}
        more = {"temperature": 0.05 - step / 1e4, "peak_memory_bytes": 2**30 + step, "skipped": int(step > 9)}
        rates = {"lr": 1e-3 / step, "grad_norm": 1.5 + math.sin(step), "masked_false_negatives": float(step)}
        lines.append({"step": step, "epoch": step / 10, "loss": 5.0, **parts, **speed, **more, **rates})
    lines.append({"step": steps, "evaluation": "words", "ndcg_at_10": 0.3456, "mrr_at_100": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"finished": True, "stopped_by": None, "steps": steps, "total_steps": steps, "skipped": 1, "rows": 50}
    facts = {"tokens": 12345, "truncated": 5, "dropped": 0, "seconds": 61.0}
    (folder / "summary.json").write_text(json.dumps({**summary, **facts, "final": {"loss": 5.0, "accuracy": 0.75}}))
    (folder / "config.yaml").write_text(f"run: {{name: {HOSTILE}}}\n")
    environment = {
        "device": "a device",
        "world_size": 3,
        "packages": {"torch": "9.9"},
        "data": "f1n9er",
        "command": ["a"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def test_a_run_is_shown_whole(tmp_path: Path) -> None:
    text = write_report(run_folder(tmp_path / "a <run>"), plan="steps <40>").read_text()
    curves = (
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Temperature",
        "Speed in examples",
        "Speed in tokens",
        "Peak memory",
    )
    for title in (*curves, "Skipped steps", "Masked false negatives", "Metrics at 10", "Metrics at 100"):
        assert f"<figure><h3>{title}</h3>" in text, title
    assert text.count("<figure>") == text.count("<svg") == 11
    for field in (
        "encoder_loss",
        "decoder_loss",
        "lr",
        "grad_norm",
        "samples_per_second",
        "masked_false_negatives",
        "mrr_at_100",
    ):
        assert (
            f'<li style="--c:var(--c{int(field == "encoder_loss") + 2 * (field == "decoder_loss")})">{field} ' in text
        )
    assert "Constant: padding 25 % of tokens." in text and "<h3>Padding" not in text
    assert "not finite in 1 lines" in text and "highest 30 at 20" in text
    shown = ("a &lt;run&gt;", "finished, 3 x a device", "steps &lt;40&gt;", "&lt;script&gt;", "torch 9.9", "f1n9er")
    for told in (*shown, "0:01:01", "5 (10.0% of examples)", "12,345", "0.3456 at step 40", "accuracy", "GiB"):
        assert told in text, told


def test_a_piece_that_is_missing_is_left_out(tmp_path: Path) -> None:
    text = write_report(tmp_path).read_text()
    assert "unfinished" in text and "<figure>" not in text and "Recipe" not in text and "Plan" not in text


def test_of_a_long_run_every_spike_stays_and_the_file_is_small(tmp_path: Path) -> None:
    chance = random.Random(0)
    draw = [{"step": i, "loss": chance.gauss(5, 0.1), "grad_norm": chance.gauss(1, 0.1)} for i in range(20_000)]
    draw[12_345]["loss"] = 77.0
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in draw))
    path = write_report(tmp_path)
    assert "highest 77 at 12,345" in path.read_text() and path.stat().st_size < 100_000
    step_N, loss_N = (np.array([line[name] for line in draw]) for name in ("step", "loss"))
    x, y = thinned(step_N, loss_N, 400)
    assert len(x) <= 400 and y.max() == 77.0 and y.min() == loss_N.min() and (np.diff(x) > 0).all()
    assert (x[0], x[-1]) == (0, 19_999) and (loss_N[x] == y).all()
    assert loss_N[::50].max() != 77.0  # every fiftieth point would have lost it


# --- an evaluation ---------------------------------------------------------------------------


def small() -> tuple[Beir, torch.Tensor, torch.Tensor]:
    """Three queries: the first finds its document, the second another, the third is between two."""
    documents = ["answer to the first", "answer to the second", f"third {HOSTILE}", "an impostor"]
    relevant = {"q0": {"d0": 1}, "q1": {"d1": 1}, "q2": {"d2": 1, "d0": 0}}
    queries = ["first", f"second {HOSTILE}", "third"]
    beir = Beir("words", [f"d{i}" for i in range(4)], documents, ["q0", "q1", "q2"], queries, relevant)
    query_QD = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    return beir, query_QD, torch.tensor([[0.9, 0.1, 0], [0, 0.2, 0], [0, 0, 0.6], [0.1, 0.8, 0.5]])


def small_view() -> tuple[Beir, View, dict[str, float]]:
    beir, query_QD, document_ND = small()
    ranking = search(query_QD, document_ND, 4)
    view = make_view("tiny & <co>", beir, RetrievalOutput(query_QD, document_ND, ranking))
    return beir, view, evaluate_run(beir, *ranking)


def test_queries_stand_from_worst_to_best_with_what_was_found_instead() -> None:
    beir, view, metrics = small_view()
    assert [result.query for result in view.query_results] == [beir.queries[1], "third", "first"]
    worst, middle, best = view.query_results
    assert (worst.relevant, worst.relevant_rank) == (beir.documents[1], 2)
    assert worst.other == "an impostor"
    assert (worst.relevant_score, worst.other_score, worst.margin) == pytest.approx((0.2, 0.8, -0.6))
    assert (middle.ndcg_at_10, best.ndcg_at_10) == (1.0, 1.0) and best.margin > middle.margin > 0
    assert sum(result.ndcg_at_10 for result in view.query_results) / 3 == pytest.approx(metrics["ndcg_at_10"])
    assert view.positive_P.tolist() == pytest.approx([0.9, 0.2, 0.6])
    assert view.hardest_Q.tolist() == pytest.approx([0.1, 0.8, 0.5])
    assert 0 < len(view.negative_P) <= 60 and not set(view.negative_P.tolist()) & set(view.positive_P.tolist())


def test_the_map_joins_each_query_with_its_document() -> None:
    beir, view, _ = small_view()
    assert len(view.point_MD) == len(view.point_texts) == 7 and view.map_queries == 3
    assert [(view.point_texts[q], view.point_texts[d]) for q, d in view.pairs] == [
        (query, document) for query, document in zip(beir.queries, beir.documents[:3], strict=True)
    ]


def test_the_same_values_give_the_same_file_and_others_another(tmp_path: Path) -> None:
    def written(folder: str, rows: list[Row], view: View) -> bytes:
        return evaluation_report.write_report(
            tmp_path / folder / "evaluation.html", small()[0], "test", rows, [view]
        ).read_bytes()

    rows = [{"model": "tiny & <co>", "ndcg_at_10": 0.5}]
    view = small_view()[1]
    assert written("a", rows, view) == written("b", rows, small_view()[1])
    assert written("a", rows, view) != written("c", rows, replace(view, point_MD=view.point_MD[::-1].copy()))


def test_a_large_evaluation_gives_a_map_of_a_thousand_points(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [f"d{i}" for i in range(5000)]
    relevant = {f"q{i}": {f"d{i}": 1} for i in range(1000)}
    beir = Beir("large", ids, [f"text {i}" for i in ids], list(relevant), [f"ask {q}" for q in relevant], relevant)
    document_ND = torch.nn.functional.normalize(torch.randn(5000, 8, generator=generator), dim=1)
    view = make_view(
        "m", beir, RetrievalOutput(document_ND[:1000], document_ND, search(document_ND[:1000], document_ND, 100))
    )
    assert (len(view.point_MD), view.map_queries, len(view.pairs)) == (1000, 250, 250)
    for q, d in view.pairs:
        assert view.point_texts[q].removeprefix("ask q") == view.point_texts[d].removeprefix("text d")
    assert (view.positive_P > 0.999).all() and len(view.query_results) == 10


def test_the_door_writes_the_report_beside_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.trained(tmp_path / "model", tmp_path / "plain")
    folder = tiny.beir_folder(tmp_path / "beir")
    config = tmp_path / "evaluate.yaml"
    values = {"models": {"one": str(model), "two": str(model)}, "evaluate": {"data": str(folder)}, "device": "cpu"}
    config.write_text(json.dumps(values))
    assert main(["--config", str(config), f"output_dir={tmp_path}/out"]) == 0
    text = (tmp_path / "out/evaluation.html").read_text()
    assert "evaluation.html" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/evaluation.json").read_text())["rows"]
    assert all(f"{row[name]:.4f}" in text for row in rows for name in row if name != "model")
    for name in (
        "BM25",
        "one",
        "two",
        "two + BM25",
        "ndcg@10",
        "Scores: one",
        "Map: two",
        "Worst queries",
        "Found instead",
    ):
        assert name in text, name
    assert read_beir(folder).queries[0] in text and text.count("<svg") == 4
    assert main(["--config", str(config)]) == 0 and "evaluation.html" not in capsys.readouterr().out


# --- both ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Title and file of each; both hold a text that would be run if it were not escaped."""
    root = tmp_path_factory.mktemp("reports")
    beir, view, metrics = small_view()
    path, rows = root / "evaluation.html", [{"model": view.model, **metrics}]
    evaluation = evaluation_report.write_report(path, beir, "test", rows, [view])
    return {"run": write_report(run_folder(root / "run")), "words, test": evaluation}


class Loads(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = re.findall(r"url\((?!#)[^)]*\)|@import.*", text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{name}={value}" for name, value in attrs if name in ("src", "srcset", "data", "action")]
        self.found += [f"{n}={v}" for n, v in attrs if n.endswith("href") and not (v or "").startswith(("#", "data:"))]
        self.found += [tag] if tag == "script" else []


def test_a_report_loads_and_runs_nothing(reports: dict[str, Path]) -> None:
    for path in reports.values():
        text = path.read_text()
        assert "&lt;script&gt;" in text and not Loads(text).found
    assert Loads(f"<style>a{{b:url(c)}}</style>{HOSTILE}").found == ["url(c)", "script", "src=http://example.org/x.png"]


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as the browser understands it, and what it has to complain about."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium on the PATH")
    still = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        *still,
        "--enable-logging=stderr",
    ]
    found = processes.run([*command, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()], limit_s=120)
    found.check_returncode()
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("title", ["run", "words, test"])
def test_a_browser_opens_it_without_complaint(title: str, reports: dict[str, Path], tmp_path: Path) -> None:
    shown, complaints = browse(reports[title], tmp_path)
    assert f"<title>{title}</title>" in shown and shown.rstrip().endswith("</body></html>") and not complaints
    assert shown.count("<svg") == reports[title].read_text().count("<svg") > 1


def test_a_browser_would_complain_of_a_text_that_is_not_escaped(tmp_path: Path) -> None:
    _, complaints = browse(page(tmp_path / "bad.html", "bad", [HOSTILE.partition("<img")[0]]), tmp_path / "profile")
    assert complaints and "a text was run" in complaints[0]
