"""On a GPU the host must not wait for a value: these functions are queued without looking at one.

They run here on the CPU as they would on a GPU, and a mode refuses the operations that wait there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive import loss as contrastive_loss
from contrastive.loss import contrastive_local_loss, distillation_local_loss
from retromae import masks
from retromae.loss import bag_of_words_nll, summed_nll
from retromae.masks import decoder_visibility, mask_tokens
from tests import tiny

B, L, D, V, M = 6, 20, 8, 50, 12


class Waits(TorchDispatchMode):
    """Raises where a GPU's result would be needed on the host, or a number of the host's copied to the GPU."""

    WAITING = (
        "_local_scalar_dense",  # .item(), bool(), int()
        "nonzero",
        "masked_select",
        "_unique2",
        "lift_fresh",  # torch.tensor(5), torch.as_tensor(5)
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in self.WAITING or by_mask:
            raise AssertionError(f"waits for the device: {func}")
        return func(*args, **(kwargs or {}))


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_BL, words_BL, lengths_B, rng_key_B, with words of one to three tokens and pads."""
    draw = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(5, L + 1, (B,), generator=draw)
    words_BL = (torch.rand(B, L, generator=draw) < 0.6).cumsum(1).short()
    position_L = torch.arange(L)
    words_BL[:, 0] = -1
    words_BL.masked_fill_(position_L >= lengths_B[:, None] - 1, -1)
    return torch.randint(5, V, (B, L), generator=draw), words_BL, lengths_B, torch.arange(B) * 7919


def unit(*shape: int) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))
    return torch.nn.functional.normalize(x, dim=-1).requires_grad_()


def encoder_masks() -> Callable[[], object]:
    args, ordinary_ids_V = texts(), torch.arange(5, V)
    return lambda: mask_tokens(*args, 0.3, 4, ordinary_ids_V)


def decoder_masks() -> Callable[[], object]:
    _, *args = texts()
    return lambda: decoder_visibility(*args, 0.5, 7)


def head() -> Callable[[], object]:
    hidden_ND, weight_VD, bias_V = unit(30, D), unit(V, D), torch.zeros(V, requires_grad=True)
    target_N = torch.arange(30)
    return lambda: summed_nll(hidden_ND, weight_VD, bias_V, target_N, tile_rows=16).backward()


def bag_of_words() -> Callable[[], object]:
    ids_BL, words_BL, _, _ = texts()
    hidden_BLD, weight_VD = unit(B, L, D), unit(V, D)
    return lambda: bag_of_words_nll(hidden_BLD, weight_VD, None, ids_BL, words_BL >= 0).backward()


def contrastive() -> Callable[[], object]:
    q_BD, d_MD, mask = unit(B, D), unit(M, D), tiny.distinct_texts(B, M)
    options = {"temperature": 0.05, "weight": 1 / B, "tile_bytes": 4 * 20}
    return lambda: (2 * contrastive_local_loss(q_BD, d_MD, None, mask, **options).value).backward()


def distillation() -> Callable[[], object]:
    q_BD, group_BGD, teacher_BG = unit(B, D), unit(B, 3, D), torch.rand(B, 3)
    return lambda: distillation_local_loss(q_BD, group_BGD, teacher_BG, temperature=0.05, weight=1 / B).backward()


@pytest.mark.parametrize("prepare", [encoder_masks, decoder_masks, head, bag_of_words, contrastive, distillation])
def test_nothing_waits_for_the_device(prepare: Callable[[], Callable[[], object]], monkeypatch: Any) -> None:
    for module in (masks, contrastive_loss):
        monkeypatch.setattr(module, "can_read", lambda x: False)
    compute = prepare()
    with Waits():
        compute()


@pytest.mark.parametrize("prepare", [encoder_masks, decoder_masks, contrastive])
def test_what_a_cpu_does_would_wait(prepare: Callable[[], Callable[[], object]]) -> None:
    compute = prepare()
    with Waits(), pytest.raises(AssertionError, match="waits for the device"):
        compute()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, is_large: x[is_large],
        lambda x, is_large: x.masked_select(is_large),
        lambda x, is_large: is_large.nonzero(),
        lambda x, is_large: bool(is_large.any()),
        lambda x, is_large: x.sum().item(),
        lambda x, is_large: x + torch.as_tensor(5),
        lambda x, is_large: x.__setitem__(is_large, 0.0),
    ],
)
def test_waiting_is_noticed(compute: Callable[[Tensor, Tensor], object]) -> None:
    x = torch.rand(9)
    is_large = x > 0.5
    with Waits(), pytest.raises(AssertionError, match="waits for the device"):
        compute(x, is_large)
