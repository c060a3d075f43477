import pytest
import torch
from transformers import AutoModel, BertConfig

from contrastive.gradcache import graph_bytes
from contrastive.model import BiEncoder
from lodestar.config.schema import (
    BatchConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScheduleConfig,
    TrainingRecipe,
)
from lodestar.data.padding import TextShape
from lodestar.planning.cost_model import (
    BERT_BASE,
    DEVICES,
    EncoderShape,
    Memory,
    StepCost,
    activation_bytes,
    memory,
    model_flops,
    seconds,
)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("width", "feed_forward", "layers"), [(64, 256, 2), (128, 256, 4)])
def test_activations_are_what_autograd_saves(precision: str, width: int, feed_forward: int, layers: int):
    config = BertConfig(
        vocab_size=100, hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BiEncoder(AutoModel.from_config(config), 0.1)
    shape = EncoderShape(layers, width, feed_forward, 100, 512)

    def saved_bytes(texts: int) -> int:
        ids, lengths = torch.ones(texts, 64, dtype=torch.int64), torch.full((texts,), 64)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return graph_bytes(lambda: model(ids, lengths, TextShape(64, has_padding=False)))

    measured = (saved_bytes(6) - saved_bytes(2)) / (
        4 * 64
    )  # of one token: what does not grow with the batch is weights
    assert activation_bytes(shape, precision, dropout=False) == pytest.approx(measured, rel=0.05)


def test_the_parameters_of_bert_base_are_counted():
    assert BERT_BASE.parameters == pytest.approx(108.9e6, rel=0.002)  # 109.5 million with the pooler


def test_zero_shards_what_its_stage_says():
    def parts(kind: str, stage: int) -> Memory:
        engine = EngineConfig(kind=kind, zero_stage=stage)  # type: ignore[arg-type]
        recipe = TrainingRecipe(
            run=RunConfig(output_dir="run"),
            model=ModelConfig(encoder="encoder"),
            batch=BatchConfig(global_size=10),
            optim=OptimConfig(lr=1e-5),
            schedule=ScheduleConfig(steps=1),
            precision="fp32",
            engine=engine,
        )
        return memory(StepCost(BERT_BASE, held_tokens=100, flops=0), recipe, world_size=10)

    whole, first, third = parts("ddp", 1), parts("deepspeed", 1), parts("deepspeed", 3)
    assert first.weights == whole.weights and first.optimizer == whole.optimizer // 10
    assert third.weights == whole.weights // 10 and third.gradients < first.gradients < whole.gradients
    assert (whole.buckets, first.buckets, third.buckets) == (0, 400_000_000, 200_000_000)
    assert whole.activations == third.activations and whole.total > first.total > third.total


def test_the_time_of_a_step_is_made_of_counted_operations_and_bytes():
    device = DEVICES["a100-40g"]
    cost = StepCost(BERT_BASE, held_tokens=0, flops=19.5e12 * 0.4, gathered_embeddings=1000, scored_pairs=10**6)
    step = seconds(cost, device, "fp32", world_size=2)
    assert step.model == pytest.approx(1.0)
    assert seconds(cost, device, "tf32", world_size=2).model == pytest.approx(19.5 / 156)
    assert step.gather == pytest.approx(2 * 0.5 * 4 * 768 * 1000 / (25e9 * 0.7))
    assert step.loss == pytest.approx(6 * 768 * 1e6 / (19.5e12 * 0.8))
    single = seconds(StepCost(BERT_BASE, held_tokens=0, flops=0), device, "bf16", world_size=1)
    assert single.reduction == single.gather == 0
    # 6 floating-point operations per parameter and token, and those of attention
    assert model_flops(BERT_BASE, 10, 0, forwards=3) == 6 * 10 * 12 * BERT_BASE.layer_parameters
