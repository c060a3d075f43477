"""The sections of a recipe that both stages share, and the arithmetic of a global batch. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field, model_validator

from lodestar.config.loader import Section
from lodestar.config.values import LARGEST, Count, Decay, Fraction, Location, Name, Natural, Processes, Seed

AUTO = "auto"
MICRO_TOKENS = 16_384
"""The default of batch.micro_tokens: about 6 GiB of activations of BERT-base in bf16."""
NEUTRAL = (
    "run.name", "run.output_dir", "data.train", "data.cache_dir", "data.processes", "data.workers", "data.strict",
    "data.query_instruction", "data.passage_instruction",
    "model.activation_checkpointing", "model.attention", "model.compile", "batch.micro_size", "batch.micro_tokens",
    "batch.keep_graph", "engine", "checkpoint", "evaluate", "track",
)  # fmt: skip
"""Keys and sections that do not change what training computes. Content and weights of data.train are checked apart."""
LearningRate = Annotated[float, Field(gt=0, le=10)]
Precision = Literal["bf16", "fp16", "tf32", "fp32"]
HALF_PRECISIONS = ("bf16", "fp16")
Pooling = Literal["cls", "mean", "last_token"]
"""From the hidden states of a text to its embedding: that of [CLS], their mean, or that of the last token."""


class RunConfig(Section):
    """The name, folder and seed of a run."""

    name: Name = "run"
    """Name of the run in trackers."""
    output_dir: Location
    """The run folder: checkpoints, metrics, the model."""
    seed: Seed = 42
    """Every random number is a function of the seed and the step."""


class ModelConfig(Section):
    """The encoder and its tokenizer."""

    encoder: Location
    """A folder or hub name in transformers' format."""
    tokenizer: Location | None = None
    """A folder or hub name; none: the encoder's own."""
    max_length: Annotated[int, Field(ge=8, le=2**20)] = 512
    """Tokens of one text, special tokens included."""
    pooling: Pooling | Literal["auto"] = AUTO
    """How a text's hidden states become its embedding. auto: as the encoder's 1_Pooling/config.json says, and cls where
    it has none. last_token: the text ends with an end-of-text token, and the encoder may be a causal decoder."""
    dropout: Decay | None = None
    """Replaces the dropout rates of the encoder's configuration; none: as they are."""
    random_weights: bool = False
    """Start from the encoder's configuration alone, with random weights."""
    random_head: bool = False
    """The masked-language-model head may be missing from the encoder and start from random weights."""
    allow_pickle: bool = False
    """Open weights that are pickle only, pytorch_model.bin, by torch's loader for weights; false: they are refused."""
    trust_remote_code: bool = False
    """Run the Python code that the encoder's folder brings. Read it first: it can do whatever you can."""
    attention: Literal["padded", "packed"] = "padded"
    """packed: the texts of a micro-batch lie end to end in one row of tokens, without padding; changes no result."""
    compile: Literal[False, "layers"] = False
    """layers: compile each layer of the encoder with torch.compile, for texts of any length: a minute or more at the
    start, then faster steps on a GPU. Changes rounding, and how dropout draws."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time, same result."""


class BatchConfig(Section):
    """The global batch, and how devices cut it."""

    one_of: ClassVar = ("micro_tokens", "micro_size")

    global_size: Count
    """Examples of one optimizer step over all devices: any number of devices makes exactly this batch."""
    micro_tokens: Annotated[int, Field(ge=8, le=LARGEST)] | Literal["auto"] | None = None
    """Tokens on one device at a time, padding included: bounds memory, changes no result. auto: the most that fit,
    measured. Give either this or micro_size; without both it is 16,384."""
    micro_size: Count | None = None
    """Examples on one device at a time, however long they are."""

    @model_validator(mode="before")
    @classmethod
    def _auto_counts_tokens(cls, values: Any) -> Any:
        if isinstance(values, dict) and cast(dict[str, Any], values).get("micro_size") == AUTO:
            raise ValueError("micro_size: is a number of examples (write batch.micro_tokens: auto)")
        return cast(Any, values)

    @model_validator(mode="after")
    def _one_limit(self) -> BatchConfig:
        if self.micro_tokens is not None and self.micro_size is not None:
            raise ValueError("needs only one of micro_tokens and micro_size (leave one of the two out)")
        return self

    def plan(self, world_size: int) -> BatchPlan:
        """How `world_size` ranks make the batch; `auto` counts as the default until a run measures it."""
        tokens = self.micro_tokens if isinstance(self.micro_tokens, int) else MICRO_TOKENS
        return BatchPlan(self.global_size, world_size, self.micro_size, None if self.micro_size else tokens)


class OptimConfig(Section):
    """The optimizer."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of the hidden layers by Muon, everything else by AdamW."""
    lr: LearningRate
    """Peak learning rate of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Of AdamW's moving averages."""
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """AdamW's term for numerical stability."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled; biases and norms are left out."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient of the whole batch; 0: no clipping."""
    muon_lr: LearningRate = 0.02
    """Peak learning rate of Muon, in units of spectral norm."""
    muon_momentum: Decay = 0.95
    """Of Muon's moving average."""

    @property
    def peak_lrs(self) -> dict[str, float]:
        """By the names under which they are logged."""
        return {"lr": self.lr, **({"muon_lr": self.muon_lr} if self.name == "muon" else {})}

    @model_validator(mode="after")
    def _muon_is_not_clipped(self) -> OptimConfig:
        if self.name == "muon" and self.clip_norm:
            raise ValueError("clip_norm: muon does not clip, as its updates have a fixed size (set optim.clip_norm: 0)")
        return self


class ScheduleConfig(Section):
    """How long to train, and the learning rate over time."""

    one_of: ClassVar = ("epochs", "steps")

    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Times that each example is seen; give either this or steps."""
    steps: Count | None = None
    """Optimizer steps."""
    warmup_ratio: Fraction = 0.1
    """Fraction of all steps in which the learning rate rises to its peak."""
    shape: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    floor: Fraction = 0.0
    """Fraction of the peak at the end."""

    @model_validator(mode="after")
    def _one_length(self) -> ScheduleConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of epochs and steps (set one of the two)")
        return self

    def total_steps(self, rows: int, global_size: int) -> int:
        """Steps of the run. By epochs: the rows at the end that fill no whole batch are dropped."""
        return self.steps if self.steps else int((self.epochs or 0) * rows) // global_size

    def warmup_steps(self, total: int) -> int:
        """Steps of the warm-up in a run of `total` steps."""
        return round(self.warmup_ratio * total)


class EngineConfig(Section):
    """What runs the model on the devices."""

    kind: Literal["ddp", "deepspeed"] = "ddp"
    """torch's DistributedDataParallel, or DeepSpeed's ZeRO."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 1 optimizer states, 2 gradients too, 3 parameters too."""
    zero3_persistence_threshold: Natural | None = None
    """Under ZeRO-3, parameters with fewer elements stay whole on each device; none: DeepSpeed's default."""
    reduce_bucket_size: Count = 50_000_000
    """Elements of the gradient that DeepSpeed reduces at once; it holds two such buckets, of 4 bytes per element."""
    give_up_after: Count = 20
    """Stop after this many steps in a row whose gradient is not finite."""
    timeout_minutes: Annotated[float, Field(gt=0, le=10**6)] = 30.0
    """Time-out of a rank that waits for the others."""


class CheckpointConfig(Section):
    """When to save, and from what to resume."""

    every_steps: Natural = 1000
    """0: only at the end of the run, and when a signal stops it."""
    keep: Count = 2
    """The number of newest checkpoints that are not deleted."""
    resume: Location = "auto"
    """auto: resume from the newest valid checkpoint of output_dir; none: start afresh; or a checkpoint folder."""
    allow_change: list[str] = []
    """Keys, or sections, that may differ from those of the checkpoint from which the run resumes, as [optim.lr]."""


class EvaluateConfig(Section):
    """Retrieval on a BEIR folder."""

    data: Location | None = None
    """A folder in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/*.tsv, gz or not."""
    split: Name = "test"
    """The file of qrels/ to use."""
    every_steps: Natural = 0
    """0: only at the end."""
    at_start: bool = False
    """Also before the first step."""
    max_queries: Count | None = None
    """Only the first queries; none: all."""
    max_documents: Count | None = None
    """Only the documents that answer those queries and the first others, up to this many; none: all."""
    batch_size: Count = 64
    """Texts embedded at once on a device."""


class TrackConfig(Section):
    """Metrics and trackers."""

    log_every: Count = 10
    """Steps between two lines of metrics.jsonl."""
    to: list[Literal["wandb", "tensorboard"]] = []
    """Trackers beside metrics.jsonl; wandb works offline where no key is set."""
    project: Name = "lodestar"
    """Name of the project in wandb."""


class TrainingDataConfig(Section):
    """What the `data` sections of both stages share."""

    cache_dir: Annotated[Location, Field(validate_default=True)] = "~/.cache/lodestar"
    """Folder of the tokenized texts; all runs share it."""
    processes: Processes = 4
    """Processes that tokenize."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Processes on each rank that prepare batches ahead; 0: none."""
    streaming: bool = False
    """Read and tokenize during training, some batches ahead, which are shuffled together; needs schedule.steps. Nothing
    is kept in cache_dir."""
    strict: bool = False
    """true: what is only warned of is an error: a misspelt field, an empty file, a query equal to its positive, ..."""


class TrainingRecipe(Section):
    """What the recipes of both stages share."""

    run: RunConfig
    model: ModelConfig
    batch: BatchConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    precision: Precision = "bf16"
    """Of matrix products; weights, gradients and losses are always fp32. tf32: fp32 whose factors a GPU rounds to 10
    bits of mantissa; on a CPU it is fp32."""
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _deepspeed_can_run_it(self) -> TrainingRecipe:
        stage = self.engine.zero_stage if self.engine.kind == "deepspeed" else None
        if self.optim.name == "muon" and stage == 3:
            raise ValueError(
                "engine.zero_stage: muon needs whole matrices (use zero_stage 0, 1 or 2, or optim.name: adamw)"
            )
        if self.model.compile and stage == 3:
            raise ValueError("model.compile: zero_stage 3 gathers weights inside the layers (use 0, 1 or 2, or false)")
        if self.precision == "fp16" and stage == 0:
            raise ValueError("engine.zero_stage: fp16 needs 1, 2 or 3 under deepspeed (or engine.kind: ddp)")
        return self


@dataclass(frozen=True)
class BatchPlan:
    """How `world_size` ranks make exactly one global batch, in equally many micro-batches on each."""

    global_size: int
    world_size: int
    micro_size: int | None = None
    """Examples of a micro-batch at most."""
    micro_tokens: int | None = None
    """Its tokens at most; one of the two is set."""

    def examples(self, rank: int) -> range:
        """This rank's part of the global batch: 32,768 over 48 ranks are 683 on 32 ranks and 682 on 16.

        The part whose loss it computes; which texts it embeds follows from their lengths.
        """
        return range(rank * self.global_size // self.world_size, (rank + 1) * self.global_size // self.world_size)

    @property
    def examples_per_rank(self) -> list[int]:
        """Sizes of the parts of all ranks."""
        return [len(self.examples(rank)) for rank in range(self.world_size)]

    def num_micro_batches(self, tokens_per_example: int = 0) -> int:
        """Micro-batches per step, the same on all ranks; by tokens, where all examples have so many."""
        examples = max(self.examples_per_rank)
        if self.micro_size is not None:
            return -(-examples // self.micro_size)
        return -(-examples * tokens_per_example // (self.micro_tokens or MICRO_TOKENS))
