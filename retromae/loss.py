"""Cross-entropy over a vocabulary without ever holding the logits of all positions.

Shape suffixes: N positions, V vocabulary, D width, B texts, L tokens (padded).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def summed_nll(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, *, chunk_rows: int = 512
) -> Tensor:
    """Sum over positions of -log p(target), in nats, fp32 (fp64 where the inputs are).

    The gradient is computed in the forward, while a chunk's logits are at hand, and only scaled in the backward: logits
    are made once, and never more than `chunk_rows` rows of them. Products follow autocast; the softmax is fp32.
    """
    return _SummedNll.apply(hidden_ND, weight_VD, bias_V, target_N, chunk_rows)  # type: ignore[no-any-return]


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, rows: int) -> Tensor:
        device = hidden_ND.device.type
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        wanted = any(ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            weight, nats = weight_VD.to(half), hidden_ND.new_zeros((), dtype=exact)
            grad_hidden = torch.zeros_like(hidden_ND, dtype=exact) if wanted else None
            grad_weight = torch.zeros_like(weight_VD, dtype=exact) if wanted else None
            grad_bias = torch.zeros_like(bias_V, dtype=exact) if wanted and bias_V is not None else None
            for at in range(0, len(hidden_ND), rows):
                hidden, target = hidden_ND[at : at + rows].to(half), target_N[at : at + rows, None]
                logits = (hidden @ weight.T).to(exact)
                if bias_V is not None:
                    logits += bias_V
                logits -= logits.amax(1, keepdim=True)
                at_target = logits.gather(1, target)
                logits.exp_()
                norm = logits.sum(1, keepdim=True)
                nats += (norm.log() - at_target).sum()
                if grad_hidden is not None and grad_weight is not None:
                    logits /= norm  # from here on the gradient: p - 1 at the target
                    logits.scatter_add_(1, target, logits.new_full(target.shape, -1.0))
                    grad = logits.to(half)
                    grad_hidden[at : at + rows] = grad @ weight
                    grad_weight += grad.T @ hidden if half != exact else 0
                    if half == exact:
                        grad_weight.addmm_(grad.T, hidden)
                    if grad_bias is not None:
                        grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        return nats

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if grad is None else (grad * grads[0]).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None)


def bag_of_words_nll(hidden_BLD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Sum over texts of the mean -log p of a text's own words, where p is the softmax of the logits' maximum over positions.

    counted_BL   the positions that count, both as words and for the maximum
    Liu et al. 2023, "RetroMAE-2: duplex masked auto-encoder", section 3.2.
    """
    nats = hidden_BLD.new_zeros((), dtype=torch.float32)
    for hidden_LD, ids_L, counted_L in zip(hidden_BLD, ids_BL, counted_BL, strict=True):
        if bool(counted_L.any()):
            words = ids_L[counted_L].unique()
            nats = nats + checkpoint(_bag_nats, hidden_LD[counted_L], weight_VD, bias_V, words, use_reentrant=False)
    return nats


def _bag_nats(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, words_W: Tensor) -> Tensor:
    """One text's term; the maximum's place is found without a graph, so that the graph holds V rows and not N x V."""
    with torch.no_grad():
        best_V = (hidden_ND @ weight_VD.T).argmax(0)
    logits_V = (hidden_ND[best_V].float() * weight_VD.float()).sum(1)
    if bias_V is not None:
        logits_V = logits_V + bias_V.float()
    return -logits_V.log_softmax(0)[words_W].mean()
