"""The decoder layer against one written with loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from lodestar.errors import ModelError
from retromae.decoder import Decoder

B, L, D, HEADS, WIDE = 2, 7, 12, 3, 20


def a_decoder(dropout: float = 0.0) -> Decoder:
    torch.manual_seed(0)
    # A large deviation, so that attention is far from uniform.
    return Decoder(D, HEADS, WIDE, "gelu", dropout, dropout, norm_eps=1e-12, init_std=0.5).double()


def a_problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    query, hiddens = (torch.randn(B, L, D, generator=g, dtype=torch.float64) for _ in range(2))
    attention_mask = torch.rand(B, 1, L, L, generator=g) < 0.5
    attention_mask[:, :, 1:, 0] = True
    attention_mask.diagonal(dim1=2, dim2=3).fill_(False)
    attention_mask[:, :, 0, L - 1] = True
    return query, hiddens, attention_mask


def norm(x_D: Tensor, layer: nn.LayerNorm) -> Tensor:
    return (x_D - x_D.mean()) / (x_D.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def by_loops(
    layer: Decoder, query: Tensor, hiddens: Tensor, attention_mask: Tensor, own_column: bool = False
) -> Tensor:
    """Position by position, head by head, over the columns of the attention mask."""
    out, size = torch.zeros_like(query), D // HEADS
    for b in range(B):
        for i in range(L):
            columns = [j for j in range(L) if attention_mask[b, 0, i, j] or (own_column and i == j)]
            context = []
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                q = layer.query(query[b, i])[part]
                scores = [float(q @ layer.key(hiddens[b, j])[part]) / math.sqrt(size) for j in columns]
                total = sum(math.exp(score) for score in scores)
                values = (layer.value(hiddens[b, j])[part] * math.exp(s) for j, s in zip(columns, scores, strict=True))
                context.append(sum(values, torch.zeros(size, dtype=query.dtype)) / total)
            attended = norm(layer.out_proj(torch.cat(context)) + query[b, i], layer.attention_norm)
            wide = layer.fc1(attended)
            wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
            out[b, i] = norm(layer.fc2(wide) + attended, layer.output_norm)
    return out


def test_the_layer_equals_one_written_with_loops() -> None:
    layer, problem = a_decoder().eval(), a_problem()
    with torch.no_grad():
        actual = layer(*problem)
        torch.testing.assert_close(actual, by_loops(layer, *problem), rtol=1e-10, atol=1e-10)
        assert (actual - by_loops(layer, *problem, own_column=True)).abs().max() > 1e-2


def test_a_masked_column_changes_nothing_and_another_does() -> None:
    layer, (query, hiddens, attention_mask) = a_decoder().eval(), a_problem()
    attention_mask[:, :, :, 3] = False
    other = hiddens.clone()
    other[:, 3] += 1.0
    assert torch.equal(layer(query, hiddens, attention_mask), layer(query, other, attention_mask))
    attention_mask[:, :, 2, 3] = True
    changed = (layer(query, hiddens, attention_mask) != layer(query, other, attention_mask)).any(2)
    assert changed.nonzero()[:, 1].unique().tolist() == [2]


def test_a_row_without_columns_has_finite_outputs_and_gradients() -> None:
    layer, (query, hiddens, attention_mask) = a_decoder(), a_problem()
    attention_mask[0, 0, 2] = False
    out = layer(query, hiddens.requires_grad_(), attention_mask)
    out.square().sum().backward()
    assert out.isfinite().all() and hiddens.grad is not None and hiddens.grad.isfinite().all()


def test_dropout_works_in_training_only() -> None:
    layer, problem = a_decoder(dropout=0.3), a_problem()
    assert not torch.equal(layer(*problem), layer(*problem))
    layer.eval()
    assert torch.equal(layer(*problem), layer(*problem))


def test_weights_start_normal_and_biases_at_zero() -> None:
    torch.manual_seed(2)
    layer = Decoder(128, 4, 512, "gelu", 0.1, 0.1, 1e-12, init_std=0.05)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.05), name


@pytest.mark.parametrize(
    ("family", "dropouts", "eps"),
    [
        ("bert", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}, {"layer_norm_eps": 1e-7}),
        ("xlm-roberta", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}, {"layer_norm_eps": 1e-7}),
        ("modernbert", {"mlp_dropout": 0.2, "attention_dropout": 0.3}, {"norm_eps": 1e-7}),
    ],
)
def test_a_decoder_takes_its_sizes_from_any_family(family: str, dropouts: dict, eps: dict) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 40, "initializer_range": 0.03}
    layer = Decoder.for_encoder(AutoConfig.for_model(family, **sizes, **dropouts, **eps))
    assert (layer.heads, layer.fc1.weight.shape) == (2, (40, 24))
    assert (layer.dropout.p, layer.attention_dropout) == (0.2, 0.3)
    assert layer.attention_norm.eps == layer.output_norm.eps == 1e-7


def test_a_configuration_without_a_size_is_an_error_of_one_line() -> None:
    with pytest.raises(ModelError, match="has no num_attention_heads"):
        Decoder.for_encoder(SimpleNamespace(hidden_size=8))
    with pytest.raises(ModelError, match="does not divide into 3 heads"):
        Decoder(8, 3, 16)
