"""What a step costs on one device, by arithmetic: memory in bytes and time in seconds. Loads without torch.

Activations are what autograd keeps of a transformer layer whose attention is fused, counted in PyTorch: under bf16
autocast 24 * width + 4 * feed_forward bytes per token and layer, in fp32 32 * width + 8 * feed_forward, and in both one
byte for each element of two dropout masks; 8 * width for the embeddings. Floating-point operations: 6 per parameter and
token for a forward and a backward pass (Kaplan et al. 2020, "Scaling laws for neural language models", 2.1), and 2 per
element of each matrix product of attention and loss.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lodestar.config.schema import EngineConfig

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Peak rates from the vendor's data sheet (dense), memory as PyTorch sees it."""

    memory_bytes: int
    half_flops: float
    """bf16 matrix products per second, in FLOP/s (fp16 on a V100)."""
    fp32_flops: float
    network_bytes: float
    """Bytes per second that each device sends to other nodes, in the usual cluster of its time."""


DEVICES = {
    "v100-32g": Device(int(31.7 * GIB), 125e12, 15.7e12, 12.5e9),
    "a100-40g": Device(int(39.4 * GIB), 312e12, 19.5e12, 25e9),
    "a100-80g": Device(int(79.2 * GIB), 312e12, 19.5e12, 25e9),
    "h100": Device(int(79.1 * GIB), 989e12, 66.9e12, 50e9),
    "h200": Device(int(139.8 * GIB), 989e12, 66.9e12, 50e9),
    "rtx-4090": Device(int(23.5 * GIB), 165e12, 82.6e12, 12.5e9),
}

MODEL_RATE, LOSS_RATE, NETWORK_RATE = 0.4, 0.8, 0.7
"""Shares of the peak rates that are counted on: assumptions, to be replaced by what a rehearsal measures."""

RUNTIME_BYTES = int(0.6 * GIB)
"""What the driver and the libraries take on a GPU: context, workspaces, buffers of collectives; an assumption."""


@dataclass(frozen=True)
class EncoderShape:
    """The sizes in an encoder's config.json that decide its memory and time."""

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
        """The same with so many more layers, as a decoder's."""
        return EncoderShape(self.layers + layers, self.width, self.feed_forward, self.vocabulary, self.positions)


BERT_BASE = EncoderShape(layers=12, width=768, feed_forward=3072, vocabulary=30522, positions=512)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    embeddings: int = 0
    tile: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Seconds:
    """Of one step on one device, by what they are for; work that overlaps is counted as if it did not."""

    model: float
    reduction: float
    gather: float = 0.0
    loss: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def activation_bytes(shape: EncoderShape, precision: str, *, checkpointing: bool = False, dropout: bool = True) -> int:
    """Of one token in all layers."""
    halved = precision != "fp32"
    layer = (24 if halved else 32) * shape.width + (4 if halved else 8) * shape.feed_forward + 2 * shape.width * dropout
    between = (2 if halved else 4) * shape.width
    return 8 * shape.width + (layer + between * shape.layers if checkpointing else layer * shape.layers)


def memory(
    shape: EncoderShape,
    *,
    engine: EngineConfig,
    world_size: int,
    precision: str,
    tokens_at_once: int,
    checkpointing: bool = False,
    embeddings: int = 0,
    tile: int = 0,
) -> Memory:
    """tokens_at_once: of one micro-batch, padding included; embeddings, tile: bytes of the loss."""
    stage = engine.zero_stage if engine.kind == "deepspeed" else 0
    share = [1 if stage < least else world_size for least in (3, 2, 1)]
    bytes_of_all = 4 * shape.parameters
    copied = world_size > 1 or engine.kind == "deepspeed"  # buckets of DDP; under ZeRO the owned part in fp32
    return Memory(
        weights=bytes_of_all // share[0] + (0 if precision == "fp32" else bytes_of_all // 2),
        gradients=bytes_of_all // share[1] + (bytes_of_all // share[2] if copied else 0),
        optimizer=2 * bytes_of_all // share[2],
        activations=tokens_at_once * activation_bytes(shape, precision, checkpointing=checkpointing),
        embeddings=embeddings,
        tile=tile,
    )


def model_flops(shape: EncoderShape, tokens: int, length: int, *, passes: float) -> float:
    """`passes`: 3 is a forward and a backward, which costs twice as much; attention is counted over whole lengths."""
    matrices = 2 * shape.layers * shape.layer_parameters
    attention = 4 * shape.layers * shape.width * length
    return passes * tokens * (matrices + attention)


def seconds(
    shape: EncoderShape,
    device: Device,
    *,
    world_size: int,
    precision: str,
    flops: float,
    gathered: int = 0,
    scored: int = 0,
) -> Seconds:
    """flops: of the model on one device; gathered: vectors of all ranks; scored: pairs that this device scores."""
    rate = (device.fp32_flops if precision == "fp32" else device.half_flops) * MODEL_RATE
    network = device.network_bytes * NETWORK_RATE
    others = (world_size - 1) / world_size
    return Seconds(
        model=flops / rate,
        reduction=2 * others * 4 * shape.parameters / network,
        gather=2 * others * 4 * shape.width * gathered / network,
        loss=6 * shape.width * scored / (device.fp32_flops * LOSS_RATE),
    )
