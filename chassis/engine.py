"""What runs a model on the hardware: forward, backward of a share, one optimizer step over all ranks.

A stage returns its share of the global loss; the engine sums gradients over ranks. Both engines average, so both
multiply the share by the world size first; no other file does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chassis import optim as optims
from chassis.collectives import gather_objects, sum_over_ranks
from chassis.errors import CheckpointError, ConfigError
from chassis.runtime import Runtime, prepare_deepspeed
from chassis.schema import Engine as EngineSection
from chassis.schema import Optim

Precision = Literal["bf16", "fp16", "fp32"]
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepReport:
    """Scalars of one optimizer step, still on the device."""

    grad_norm: Tensor
    """Norm of the gradient of the whole global batch, before clipping."""
    skipped: Tensor
    """1 where the gradient was not finite and nothing was changed, else 0."""


@dataclass(frozen=True)
class Resumed:
    """What an engine needs of a checkpoint."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    updates: int
    """Steps that were not skipped."""
    values: Mapping[str, float]


class Engine(Protocol):
    module: nn.Module

    def run(self, *inputs: Any, last: bool) -> Any:
        """The model's forward; `last`: the backward of this one is the step's last."""
        ...

    def backward(self, share: Tensor, *, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; the last one sums over ranks."""
        ...

    def step(self, lr_factor: float) -> StepReport:
        """Update with each group's peak learning rate times `lr_factor`."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 parameters by name, on the CPU; every rank must call."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole optimizer states as `PARAMETER:KEY`, on the CPU, the same for any engine; every rank must call."""
        ...

    def values(self) -> dict[str, float]:
        """The few numbers besides tensors that the next step depends on."""
        ...

    def resume(self, checkpoint: Resumed) -> None:
        """Take over states that any engine at any world size wrote; the weights are in the module already."""
        ...


def build(module: nn.Module, runtime: Runtime, section: EngineSection, optim: Optim, precision: Precision) -> Engine:
    """The engine of the recipe around `module`, whose weights are already those to start from."""
    if precision == "fp16" and runtime.device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU (use fp32 or bf16 here)")
    module.to(runtime.device)
    # All ranks or none: an update that differs by bf16's rounding would let their weights drift apart.
    muon_fp32 = optim.name == "muon" and not all(gather_objects(runtime.multiplies_bf16()))
    if section.kind == "ddp":
        return DdpEngine(module, runtime, optim, precision, muon_fp32)
    return ZeroEngine(module, runtime, section, optim, precision, muon_fp32)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in half precision on fp32 weights, so that gradients of many chunks add up in fp32."""
    return torch.autocast(device.type, _HALF[precision]) if precision in _HALF else nullcontext()


class _Autocast(nn.Module):
    """Enters autocast inside the forward, where no engine's own settings can switch it off again."""

    def __init__(self, module: nn.Module, device: torch.device, precision: str) -> None:
        super().__init__()
        self.inner, self.device, self.precision = module, device, precision

    def forward(self, *inputs: Any) -> Any:
        with autocast(self.device, self.precision):
            return self.inner(*inputs)


class DdpEngine:
    """torch's DistributedDataParallel; weights, gradients and states whole on every rank."""

    def __init__(
        self, module: nn.Module, runtime: Runtime, optim: Optim, precision: Precision, muon_fp32: bool
    ) -> None:
        self.module, self._muon_fp32 = module, muon_fp32
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._world_size = runtime.world_size
        self._wrapped: nn.Module = _Autocast(module, runtime.device, precision)
        if runtime.world_size > 1:
            for said in ("find_unused_parameters=True was specified", "`broadcast_buffers` is deprecated"):
                warnings.filterwarnings("ignore", message=said)
            self._wrapped = DistributedDataParallel(
                self._wrapped,
                device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
                broadcast_buffers=False,
                # Without this DDP puts gradients into other buckets after the first step, and so sums them in another
                # order than a resumed run does in its first: equal weights would differ in their last bit.
                find_unused_parameters=True,
            )
        self._clip_norm = optim.clip_norm
        parameter_groups = optims.groups(module, optim)
        plain = [group for group in parameter_groups if not group["use_muon"]]
        hidden = [group for group in parameter_groups if group["use_muon"]]
        self._adamw = optims.adamw(plain, optim)
        self._optimizers: list[tuple[torch.optim.Optimizer, tuple[str, ...]]] = [
            (self._adamw, ("exp_avg", "exp_avg_sq"))
        ]
        if hidden:
            self._optimizers.append((optims.muon(hidden, optim), ("momentum_buffer",)))
        # A loss scale is a power of two: it moves fp16 gradients away from zero and changes no digit of them.
        self._scale = 2.0**16 if precision == "fp16" else 1.0
        self._fixed_scale, self._good_steps = precision != "fp16", 0

    def _local(self, last: bool) -> AbstractContextManager[Any]:
        wrapped = self._wrapped
        return nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()

    def run(self, *inputs: Any, last: bool) -> Any:
        with self._local(last):
            return self._wrapped(*inputs)

    def backward(self, share: Tensor, *, last: bool) -> None:
        with self._local(last):
            (share * (self._world_size * self._scale)).backward()

    def step(self, lr_factor: float) -> StepReport:
        parameters = [p for p in self._names if p.grad is not None]
        if self._scale != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / self._scale)
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm or math.inf)
        finite = torch.isfinite(norm)
        skip = not self._fixed_scale and not bool(finite)
        if not skip:
            self._update(lr_factor, finite)
        self._adjust_scale(skip)
        for parameter in parameters:
            parameter.grad = None
        return StepReport(norm, (~finite).float())

    def _update(self, lr_factor: float, finite: Tensor) -> None:
        for optimizer, _ in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_factor
        self._adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW skips by it, without a sync
        self._adamw.grad_scale = None  # type: ignore[attr-defined]
        self._adamw.step()
        for optimizer, _ in self._optimizers[1:]:
            if bool(finite):
                with optims.muon_in_fp32(self._muon_fp32):
                    optimizer.step()

    def _adjust_scale(self, skipped: bool) -> None:
        if self._fixed_scale:
            return
        self._good_steps = 0 if skipped else self._good_steps + 1
        if skipped:
            self._scale = max(1.0, self._scale / 2)
        elif self._good_steps % 2000 == 0:
            self._scale *= 2

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", torch.float32, copy=True) for parameter, name in self._names.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{self._names[cast(nn.Parameter, parameter)]}:{key}": state[key].detach().to("cpu", copy=True)
            for optimizer, keys in self._optimizers
            for parameter, state in optimizer.state.items()
            for key in keys
        }

    def values(self) -> dict[str, float]:
        return {"loss_scale": self._scale, "good_steps": self._good_steps}

    def resume(self, checkpoint: Resumed) -> None:
        for optimizer, keys in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name, device = self._names[parameter], parameter.device
                    state = {key: _state_of(name, key, checkpoint.optimizer).to(device) for key in keys}
                    if optimizer is self._adamw:
                        state["step"] = torch.tensor(float(checkpoint.updates), device=device)
                    optimizer.state[parameter] = state
        if not self._fixed_scale:
            self._scale = checkpoint.values.get("loss_scale", self._scale)
            self._good_steps = int(checkpoint.values.get("good_steps", 0))


class ZeroEngine:
    """DeepSpeed: optimizer states (1), gradients (2), parameters (3) sharded over ranks; 0 shards nothing."""

    def __init__(
        self,
        module: nn.Module,
        runtime: Runtime,
        section: EngineSection,
        optim: Optim,
        precision: Precision,
        muon_fp32: bool,
    ) -> None:
        prepare_deepspeed()
        import deepspeed

        self.module, self._muon_fp32 = module, muon_fp32
        if optim.name == "muon" and section.zero_stage == 3:
            raise ConfigError(
                "engine.zero_stage: muon needs whole matrices (use zero_stage 0, 1 or 2, or optim.name: adamw)"
            )
        if precision == "fp16" and section.zero_stage == 0:
            raise ConfigError("engine.zero_stage: fp16 needs 1, 2 or 3 under deepspeed (or engine.kind: ddp)")
        self._device, self._stage = runtime.device, section.zero_stage
        self._rank, self._world_size = runtime.rank, runtime.world_size
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._muon, self._half = optim.name == "muon", precision == "fp16"
        parameter_groups = optims.groups(module, optim)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # unused: shares are summed by us
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {"stage": section.zero_stage, "reduce_scatter": optim.name != "muon"},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if section.zero3_persistence_threshold is not None:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = section.zero3_persistence_threshold
        if precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000}
        inner: nn.Module = _Autocast(module, runtime.device, "bf16") if precision == "bf16" else module
        self._engine: Any = deepspeed.initialize(
            model=inner,
            optimizer=_deepspeed_muon(parameter_groups, optim) if self._muon else optims.adamw(parameter_groups, optim),
            config=config,
            dist_init_required=False,
        )[0]
        if self._muon and section.zero_stage > 0:
            self._muon_norm = _MuonNorm(self._engine.optimizer)

    def run(self, *inputs: Any, last: bool) -> Any:
        return self._engine(*inputs)

    def backward(self, share: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with optims.muon_in_fp32(self._muon_fp32):  # ZeRO-1 and 2 orthogonalise here
            self._engine.backward(share * self._world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> StepReport:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        norm = torch.zeros((), device=self._device)
        if self._stage == 0:  # DeepSpeed has neither a norm nor a check here
            norm = nn.utils.get_total_norm([p.grad for p in self._names if p.grad is not None])
            if not bool(torch.isfinite(norm)):
                self._engine.optimizer.zero_grad()
                return StepReport(norm, torch.ones((), device=self._device))
        elif self._muon:
            norm = self._muon_norm.read()
        skipped_before = self._engine.skipped_steps
        with optims.muon_in_fp32(self._muon_fp32):  # ZeRO-0 here
            self._engine.step()
        if self._stage > 0 and not self._muon:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._device, dtype=torch.float32)
        skipped = self._engine.skipped_steps - skipped_before
        return StepReport(norm, torch.tensor(float(skipped), device=self._device))

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, Any] = {name: safe_get_full_fp32_param(parameter) for parameter, name in self._names.items()}
        return {
            n: (p if whole[n] is None else whole[n]).detach().to("cpu", torch.float32, copy=True)
            for p, n in self._names.items()
        }

    def optimizer_state(self) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for parameter, name in self._trained():
            for key in self._keys(parameter):
                whole = torch.zeros(_full_shape(parameter).numel(), device=self._device)
                piece = self._piece(parameter, key)
                if piece is not None and piece.owned:
                    whole[piece.start : piece.start + len(piece.state)] = piece.state
                if self._stage > 0:
                    whole = sum_over_ranks(whole)
                result[f"{name}:{key}"] = whole.view(_full_shape(parameter)).cpu()
        return result

    def values(self) -> dict[str, float]:
        if not self._half:
            return {}
        scaler = self._engine.optimizer.loss_scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"loss_scale": scaler.cur_scale, "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}

    def resume(self, checkpoint: Resumed) -> None:
        for parameter, name in self._trained():
            for key in self._keys(parameter):
                value = _state_of(name, key, checkpoint.optimizer)
                piece = self._piece(parameter, key, checkpoint.updates)
                if piece is not None:
                    piece.state.copy_(value.flatten()[piece.start : piece.start + len(piece.state)])
        if self._half:  # the module holds fp16 copies; the fp32 weights are DeepSpeed's own
            from deepspeed.utils import safe_set_full_fp32_param

            for parameter, name in self._trained():
                safe_set_full_fp32_param(parameter, checkpoint.weights[name].to(self._device))
            scaler, found = self._engine.optimizer.loss_scaler, checkpoint.values
            scaler.cur_scale = found.get("loss_scale", scaler.cur_scale)
            scaler.cur_iter, scaler.last_overflow_iter = int(found.get("good_steps", 0)), -1
            scaler.cur_hysteresis = int(found.get("hysteresis", scaler.cur_hysteresis))

    def _trained(self) -> list[tuple[nn.Parameter, str]]:
        return [(parameter, name) for parameter, name in self._names.items() if parameter.requires_grad]

    def _keys(self, parameter: Tensor) -> tuple[str, ...]:
        return (
            ("momentum_buffer",) if getattr(parameter, "use_muon", False) and self._muon else ("exp_avg", "exp_avg_sq")
        )

    def _piece(self, parameter: Any, key: str, updates: int | None = None) -> _Piece | None:
        """This rank's piece of a parameter's state, if it has one; created at zero where `updates` is given."""
        zero: Any = self._engine.optimizer
        before = 0
        if self._stage == 0:
            owner, states, size = parameter, zero.state, parameter.numel()
            start, at, count, owned = 0, 0, parameter.numel(), True
        elif self._stage == 3:
            group, at, count = zero.grad_position[zero.get_param_id(parameter)]
            owner, states = zero.fp32_partitioned_groups_flat[group], zero.optimizer.state
            start, size, owned = self._rank * count, owner.numel(), True
            count = max(0, min(count, parameter.ds_numel - start))
        else:
            mapping = parameter._hp_mapping
            if mapping is None:
                return None
            group = mapping.param_group_index
            owner, states = zero.single_partition_of_fp32_groups[group], zero.optimizer.state
            whole, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
            start, at, count, size, owned = whole.start, flat.start, whole.numel, owner.numel(), True
            if key == "momentum_buffer":  # whole matrices, one after another, on every rank that owns a part of one
                neighbours = zero.params_in_partition[group]
                for neighbour in neighbours:
                    if neighbour is parameter:
                        break
                    before += neighbour.numel()
                start, at, count, owned = 0, before, parameter.numel(), whole.start == 0
                size = sum(neighbour.numel() for neighbour in neighbours)
        state = states[owner]
        if updates is not None:
            shape = parameter.shape if self._stage == 0 else (size,)
            state.setdefault(key, torch.zeros(shape, dtype=torch.float32, device=owner.device))
            if key != "momentum_buffer":
                state.setdefault("step", torch.tensor(float(updates), device=owner.device))
        return _Piece(state[key].view(-1)[at : at + count], start, owned)


@dataclass(frozen=True)
class _Piece:
    """A run of one parameter's optimizer state: `state` is a view, `start` its place in the flattened parameter."""

    state: Tensor
    start: int
    owned: bool
    """Whether this rank is the one that contributes it when pieces are added up."""


def _deepspeed_muon(parameter_groups: list[optims.Group], optim: Optim) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which orthogonalises matrices before they are sharded; made here because a config would pick
    the matrices by their names."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    of_muon = {"momentum": optim.muon_momentum, "ns_method": "standard"}
    of_adam = {"betas": optim.betas, "eps": optim.eps}
    for group in parameter_groups:
        group |= of_muon if group["use_muon"] else of_adam
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    rates = {"lr": optim.lr, "fused": True, **of_adam}
    return MuonWithAuxAdam(parameter_groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs=rates)


class _MuonNorm:
    """The norm of the gradient under ZeRO-1 and 2 with Muon.

    DeepSpeed's own is taken when the matrices' gradients have been replaced by their orthogonal updates, whose norms
    depend on nothing but their shapes.
    """

    def __init__(self, zero: Any) -> None:
        self._zero, self._orthogonalise = zero, zero.get_flat_partition
        self._muon_square: Tensor | float = 0.0
        zero.get_flat_partition = self._measured

    def _measured(self, parameters: list[Any], *args: Any, param_group_idx: int, **more: Any) -> Any:
        zero, group = self._zero, param_group_idx
        if parameters and zero._is_muon_group(parameters):
            partition = dist.get_rank(zero.real_dp_process_group[group])
            starts, places = (
                table[group][partition] for table in (zero.grad_start_offset, zero.grad_partition_insertion_offset)
            )
            for parameter, gradient in zip(parameters, zero.all_grad_tensors[group], strict=True):
                start, place = (int(table[zero.get_param_id(parameter)]) for table in (starts, places))
                end = start + min(parameter.numel() - start, int(zero.partition_size[group]) - place)
                self._muon_square = self._muon_square + gradient.flatten()[start:end].float().square().sum()
        return self._orthogonalise(parameters, *args, param_group_idx=param_group_idx, **more)

    def read(self) -> Tensor:
        """() fp32, over all ranks; once for each step, before it."""
        zero = self._zero
        others = [
            piece.float().square().sum()
            for group, pieces in zero.averaged_gradients.items()
            if pieces and not (zero.params_in_partition[group] and zero._is_muon_group(zero.params_in_partition[group]))
            for piece in pieces
        ]
        local = torch.zeros((), device=zero.device) + self._muon_square + sum(others)
        self._muon_square = 0.0
        return sum_over_ranks(local).sqrt() / zero.loss_scale


def _full_shape(parameter: Any) -> torch.Size:
    """ZeRO-3 leaves an empty tensor in a parameter's place."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape


def _state_of(name: str, key: str, state: Mapping[str, Tensor]) -> Tensor:
    if f"{name}:{key}" not in state:
        raise CheckpointError(
            f"checkpoint.resume: no {key} of {name} in it: it was written by another optimizer or model "
            "(restore the recipe, or start afresh with checkpoint.resume=none)"
        )
    return state[f"{name}:{key}"]
