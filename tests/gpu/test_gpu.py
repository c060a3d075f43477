"""What only a GPU can show; skips itself elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from contrastive.loss import contrastive_local_loss
from lodestar.distributed.runtime import Placement, joined
from retrieval.embedding.embedder import Embedder
from retrieval.embedding.exact_search import distributed_search
from retrieval.mining.shard_search import nearest
from retromae.masks import decoder_visibility
from tests import tiny
from tests.distributed import steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def step_on(device: str, stage: str, folder: Path, *overrides: str) -> steps.Outcome:
    return steps.one_step(0, 1, steps.recipe(stage, folder, *overrides), device)[0]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1), ("fp16", 0.03)])
def test_a_step_on_a_gpu_is_that_of_a_cpu(stage: str, precision: str, tolerance: float, tmp_path: Path) -> None:
    with joined(Placement(0, 1, 0)):
        on_cpu = step_on("cpu", stage, tmp_path, "precision=fp32")
        on_gpu = step_on("cuda", stage, tmp_path, f"precision={precision}")
    assert steps.distance(on_gpu, on_cpu) < tolerance


def test_masks_are_the_same_to_the_bit_on_both_devices() -> None:
    words = torch.arange(64).repeat(5, 1) // 3
    words[:, 0] = -1
    lengths, keys = torch.full((5,), 64), torch.arange(5) * 7919
    on_cpu = decoder_visibility(words, lengths, keys, 0.5, 16)
    assert decoder_visibility(words.cuda(), lengths.cuda(), keys.cuda(), 0.5, 16).cpu().equal(on_cpu)


def test_the_loss_holds_no_more_than_a_tile_of_scores() -> None:
    queries, passages, width = 8192, 16384, 256
    q, d = (torch.nn.functional.normalize(torch.randn(n, width, device="cuda"), dim=1) for n in (queries, passages))
    identity = tiny.distinct_texts(queries, passages, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    q.requires_grad_(), d.requires_grad_()
    contrastive_local_loss(q, d, None, identity, temperature=0.01, weight=1 / queries).value.backward()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < 8 * (64 << 20)  # the whole matrix would take 512 MiB, and its gradient as much


def test_embeddings_and_searches_on_a_gpu_are_those_of_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="an optional library: lodestar-embeddings[mine]")
    folder, texts = tiny.trained(tmp_path / "model", tmp_path / "plain"), tiny.texts(200, seed=4)
    on_cpu = Embedder(folder, ["cpu"]).encode_documents(texts)
    np.testing.assert_allclose(Embedder(folder, ["cuda:0"]).encode_documents(texts), on_cpu, atol=1e-4)
    in_bf16 = Embedder(folder, ["cuda:0"], precision="bf16").encode_documents(texts)
    assert (in_bf16 * on_cpu).sum(1).min() > 0.99
    (cpu_scores, _), (gpu_scores, rows) = (nearest(on_cpu[:9], on_cpu, 5, device) for device in ("cpu", "cuda:0"))
    np.testing.assert_allclose(gpu_scores, cpu_scores, atol=1e-4)
    assert rows[:, 0].tolist() == list(range(9))
    x_ND = torch.from_numpy(on_cpu)
    together = distributed_search(x_ND[:9], x_ND, 5, torch.device("cuda"))
    assert together[0].device.type == "cpu" and together[1][:, 0].tolist() == list(range(9))
