"""What a step costs on one device, by arithmetic: memory in bytes and time in seconds. Loads without torch.

Activations are what autograd saves of a transformer layer with fused attention, counted in PyTorch: under bf16
autocast 24 * width + 4 * feed_forward bytes per token and layer, in fp32 32 * width + 8 * feed_forward, and in both one
byte for each element of two dropout masks; 8 * width for the embeddings. Floating-point operations: 6 per parameter and
token for a forward and a backward pass (Kaplan et al. 2020, "Scaling laws for neural language models", 2.1), and 2 per
element of each matrix product of attention and loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from lodestar.config.schema import HALF_PRECISIONS, Precision, TrainingRecipe

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's data sheet (dense), memory as PyTorch sees it."""

    memory_bytes: int
    half_flops: float
    """bf16 matrix products per second, in FLOP/s (fp16 on a V100)."""
    tf32_flops: float
    fp32_flops: float
    network_bytes: float
    """Bytes per second that each device sends to other nodes, in a usual cluster of its time."""


DEVICES = {
    "v100-32g": Device(int(31.7 * GIB), 125e12, 15.7e12, 15.7e12, 12.5e9),
    "a100-40g": Device(int(39.4 * GIB), 312e12, 156e12, 19.5e12, 25e9),
    "a100-80g": Device(int(79.2 * GIB), 312e12, 156e12, 19.5e12, 25e9),
    "h100": Device(int(79.1 * GIB), 989e12, 494e12, 66.9e12, 50e9),
    "h200": Device(int(139.8 * GIB), 989e12, 494e12, 66.9e12, 50e9),
    "rtx-4090": Device(int(23.5 * GIB), 165e12, 82.6e12, 82.6e12, 12.5e9),
}

MODEL_RATE, LOSS_RATE, NETWORK_RATE = 0.4, 0.8, 0.7
"""Fractions of the peak rates that are reached: assumptions; a dry run (--rehearse) measures the time."""

RUNTIME_BYTES = int(0.6 * GIB)
"""Memory of driver and libraries on a GPU: context, workspaces, buffers of collectives; an assumption."""


@dataclass(frozen=True)
class EncoderShape:
    """The sizes in an encoder's config.json that determine its memory and time."""

    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    positions: int

    @property
    def layer_parameters(self) -> int:
        return 4 * self.width**2 + 2 * self.width * self.feed_forward + 9 * self.width + self.feed_forward

    @property
    def parameters(self) -> int:
        return (self.vocabulary + self.positions + 4) * self.width + self.layers * self.layer_parameters

    def deeper(self, layers: int) -> EncoderShape:
        """The same with more layers, as a decoder's."""
        return EncoderShape(self.layers + layers, self.width, self.feed_forward, self.vocabulary, self.positions)


BERT_BASE = EncoderShape(layers=12, width=768, feed_forward=3072, vocabulary=30522, positions=512)


@dataclass(frozen=True)
class StepCost:
    """What a step costs the rank with the most examples."""

    shape: EncoderShape
    held_tokens: int
    """Tokens of the micro-batches whose activations are in memory at once, padding included."""
    flops: float
    """Floating-point operations of the model."""
    embedding_bytes: int = 0
    """Of local embeddings, and of gathered ones with their gradients."""
    loss_bytes: int = 0
    """Of the largest tile of scores or logits."""
    gathered_embeddings: int = 0
    """Embeddings gathered from all ranks."""
    scored_pairs: int = 0
    """Pairs of anchor and candidate."""


class _Parts:
    """Parts of a sum, by name."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory(_Parts):
    """Bytes on one device at the peak."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    embeddings: int
    tile: int
    buckets: int
    """In which DeepSpeed reduces gradients; DDP's are part of the gradients."""


@dataclass(frozen=True)
class Seconds(_Parts):
    """Of one step on one device, as if no work overlapped."""

    model: float
    reduction: float
    gather: float
    loss: float


def activation_bytes(shape: EncoderShape, precision: str, *, checkpointing: bool = False, dropout: bool = True) -> int:
    """Bytes of one token's activations in all layers."""
    half_precision = precision in HALF_PRECISIONS
    layer = (
        (24 if half_precision else 32) * shape.width
        + (4 if half_precision else 8) * shape.feed_forward
        + 2 * shape.width * dropout
    )
    layer_input = (2 if half_precision else 4) * shape.width
    return 8 * shape.width + (layer + layer_input * shape.layers if checkpointing else layer * shape.layers)


def memory(cost: StepCost, recipe: TrainingRecipe, world_size: int) -> Memory:
    """Estimated bytes on one device, by what they are for."""
    engine, half_precision = recipe.engine, recipe.precision in HALF_PRECISIONS
    zero_stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    weight_shards, gradient_shards, state_shards = (
        1 if zero_stage < min_stage else world_size for min_stage in (3, 2, 1)
    )
    parameter_bytes = 4 * cost.shape.parameters
    has_copies = world_size > 1 or engine.kind == "deepspeed"  # buckets of DDP; under ZeRO this rank's part in fp32
    checkpointing = recipe.model.activation_checkpointing
    return Memory(
        weights=parameter_bytes // weight_shards + (parameter_bytes // 2 if half_precision else 0),
        gradients=parameter_bytes // gradient_shards + (parameter_bytes // state_shards if has_copies else 0),
        optimizer=2 * parameter_bytes // state_shards,
        activations=cost.held_tokens * activation_bytes(cost.shape, recipe.precision, checkpointing=checkpointing),
        embeddings=cost.embedding_bytes,
        tile=cost.loss_bytes,
        buckets=4 * min(engine.reduce_bucket_size, cost.shape.parameters) * {0: 0, 3: 1}.get(zero_stage, 2),
    )


def model_flops(shape: EncoderShape, tokens: int, length: int, *, forwards: float) -> float:
    """Floating-point operations on `tokens` tokens in texts of `length` tokens, padding included.

    The last layer counts as a whole, though `cls` pooling leaves out part of it.
    forwards   3 for a forward and a backward, which costs as much as two
    """
    matrices = 2 * shape.layers * shape.layer_parameters
    attention = 4 * shape.layers * shape.width * length
    return forwards * tokens * (matrices + attention)


def seconds(cost: StepCost, device: Device, precision: Precision, world_size: int) -> Seconds:
    """Estimated seconds of one step, by what they are for."""
    shape = cost.shape
    flops = {"fp32": device.fp32_flops, "tf32": device.tf32_flops}.get(precision, device.half_flops)
    network_rate = device.network_bytes * NETWORK_RATE
    fraction_of_others = (world_size - 1) / world_size
    return Seconds(
        model=cost.flops / (flops * MODEL_RATE),
        reduction=2 * fraction_of_others * 4 * shape.parameters / network_rate,
        gather=2 * fraction_of_others * 4 * shape.width * cost.gathered_embeddings / network_rate,
        loss=6 * shape.width * cost.scored_pairs / (device.fp32_flops * LOSS_RATE),
    )
