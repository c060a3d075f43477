"""DeepSpeed's ZeRO, stages 0 to 3, as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lodestar.config.schema import EngineConfig, OptimConfig, Precision
from lodestar.distributed.collectives import gather_objects, gather_on_main, sum_over_ranks
from lodestar.distributed.runtime import Runtime, prepare_deepspeed
from lodestar.errors import ConfigError
from lodestar.training import optim as optims
from lodestar.training.engine import Autocast, ResumeState, StepReport, state_tensor
from lodestar.training.host_memory import HostMemory, copy_all

_WEIGHT = "weight"
"""Beside the keys of optimizer states: the fp32 weights."""


class ZeroEngine:
    """DeepSpeed: shards optimizer states (1), gradients too (2), parameters too (3) over ranks; 0 shards nothing."""

    def __init__(
        self,
        module: nn.Module,
        runtime: Runtime,
        engine: EngineConfig,
        optim: OptimConfig,
        precision: Precision,
        muon_fp32: bool,
    ) -> None:
        prepare_deepspeed()
        import deepspeed

        self.module, self._muon_fp32 = module, muon_fp32
        if optim.name == "muon" and engine.zero_stage == 3:
            raise ConfigError(
                "engine.zero_stage: muon needs whole matrices (use zero_stage 0, 1 or 2, or optim.name: adamw)"
            )
        if precision == "fp16" and engine.zero_stage == 0:
            raise ConfigError("engine.zero_stage: fp16 needs 1, 2 or 3 under deepspeed (or engine.kind: ddp)")
        self._device, self._stage = runtime.device, engine.zero_stage
        self._rank, self._world_size = runtime.rank, runtime.world_size
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._layouts: dict[str, list[list[tuple[str, int, int]]]] = {}
        """Of each rank's fragments of weights and states: (name, first element, elements)."""
        self._muon, self._half = optim.name == "muon", precision == "fp16"
        parameter_groups = optims.groups(module, optim)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # unused: the engine sums local losses
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.clip_norm,
            "zero_optimization": {
                "stage": engine.zero_stage,
                "reduce_scatter": optim.name != "muon",
                "reduce_bucket_size": min(engine.reduce_bucket_size, sum(p.numel() for p in self._names)),
                "overlap_comm": True,
            },
            "zero_allow_untested_optimizer": True,
            "timers": {"throughput": {"enabled": False}},  # else the device is waited for in every forward
            "steps_per_print": 10**9,
        }
        if engine.zero3_persistence_threshold is not None:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = engine.zero3_persistence_threshold
        if precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 2000}
        inner: nn.Module = Autocast(module, runtime.device, "bf16") if precision == "bf16" else module
        self._engine: Any = deepspeed.initialize(
            model=inner,
            optimizer=_deepspeed_muon(parameter_groups, optim) if self._muon else optims.adamw(parameter_groups, optim),
            config=config,
            dist_init_required=False,
        )[0]
        if self._muon and engine.zero_stage > 0:
            self._muon_norm = _MuonNorm(self._engine.optimizer)

    def run(self, *inputs: Any, last: bool) -> Any:
        return self._engine(*inputs)

    def backward(self, local_loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with optims.muon_in_fp32(self._muon_fp32):  # ZeRO-1 and 2 orthogonalise in the backward
            self._engine.backward(local_loss * self._world_size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> StepReport:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        norm = torch.zeros((), device=self._device)
        if self._stage == 0:  # DeepSpeed computes no norm and checks nothing
            norm = nn.utils.get_total_norm([p.grad for p in self._names if p.grad is not None])
            if not bool(torch.isfinite(norm)):
                self._engine.optimizer.zero_grad()
                return StepReport(norm, torch.ones((), device=self._device))
        elif self._muon:
            norm = self._muon_norm.read()
        skipped_before = self._engine.skipped_steps
        with optims.muon_in_fp32(self._muon_fp32):  # ZeRO-0 orthogonalises in the step
            self._engine.step()
        if self._stage > 0 and not self._muon:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._device, dtype=torch.float32)
        skipped = self._engine.skipped_steps - skipped_before
        return StepReport(norm, torch.full((), float(skipped), device=self._device))

    def weights(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        memory, trained = memory or HostMemory(), self._trained_parameters()
        whole = self._whole(_WEIGHT, {name: parameter for parameter, name in trained}, memory)
        frozen = {name: p for p, name in self._names.items() if not p.requires_grad and self._rank == 0}
        return {**whole, **memory.copy("frozen", frozen)}

    def optimizer_state(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        memory, trained = memory or HostMemory(), self._trained_parameters()
        by_key: dict[str, dict[str, nn.Parameter]] = {}
        for parameter, name in trained:
            for key in self._keys(parameter):
                by_key.setdefault(key, {})[f"{name}:{key}"] = parameter
        return {n: tensor for key, of_key in by_key.items() for n, tensor in self._whole(key, of_key, memory).items()}

    def _whole(self, key: str, parameters: Mapping[str, nn.Parameter], memory: HostMemory) -> dict[str, Tensor]:
        """On rank 0, the weights or states `key` of parameters by name, of the fragments of all ranks: one collective.

        Nothing elsewhere.
        """
        fragments = [(name, self._fragment(parameter, key)) for name, parameter in parameters.items()]
        local = [(name, each) for name, each in fragments if each and each.contributes and len(each.state)]
        states = [each.state.detach() for _, each in local]
        flat_N = torch.cat(states) if states else torch.empty(0, device=self._device)
        if key not in self._layouts:  # it never changes
            layout = [(name, each.start, len(each.state)) for name, each in local]
            self._layouts[key] = gather_objects(layout) if self._stage > 0 else [layout]
        layouts = self._layouts[key]
        if self._stage > 0:
            parts = gather_on_main(flat_N, [sum(count for *_, count in layout) for layout in layouts])
        else:
            parts = [flat_N]
        if self._rank > 0:
            return {}
        shapes = {name: _full_shape(parameter) for name, parameter in parameters.items()}
        assert sum(map(len, parts)) == sum(shape.numel() for shape in shapes.values())
        whole = memory.allocate(key, shapes, self._device)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for layout, part_N in zip(layouts, parts, strict=True):
            targets += [whole[name].view(-1)[start : start + count] for name, start, count in layout]
            sources += part_N.split([count for *_, count in layout])
        copy_all(targets, sources)
        return whole

    def values(self) -> dict[str, float]:
        if not self._half:
            return {}
        scaler = self._engine.optimizer.loss_scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"loss_scale": scaler.cur_scale, "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}

    def resume(self, checkpoint: ResumeState) -> None:
        for parameter, name in self._trained_parameters():
            for key in self._keys(parameter):
                value = state_tensor(name, key, checkpoint.optimizer)
                fragment = self._fragment(parameter, key, checkpoint.updates)
                if fragment is not None:
                    fragment.state.copy_(value.flatten()[fragment.start : fragment.start + len(fragment.state)])
        if self._half:  # the module has fp16 copies; DeepSpeed has the fp32 weights
            from deepspeed.utils import safe_set_full_fp32_param

            for parameter, name in self._trained_parameters():
                safe_set_full_fp32_param(parameter, checkpoint.weights[name].to(self._device))
            scaler, values = self._engine.optimizer.loss_scaler, checkpoint.values
            scaler.cur_scale = values.get("loss_scale", scaler.cur_scale)
            scaler.cur_iter, scaler.last_overflow_iter = int(values.get("good_steps", 0)), -1
            scaler.cur_hysteresis = int(values.get("hysteresis", scaler.cur_hysteresis))

    def _trained_parameters(self) -> list[tuple[nn.Parameter, str]]:
        return [(parameter, name) for parameter, name in self._names.items() if parameter.requires_grad]

    def _keys(self, parameter: Tensor) -> tuple[str, ...]:
        """Of the optimizer states of a parameter."""
        return (
            ("momentum_buffer",) if getattr(parameter, "use_muon", False) and self._muon else ("exp_avg", "exp_avg_sq")
        )

    def _fragment(self, parameter: Any, key: str, updates: int | None = None) -> _Fragment | None:
        """This rank's fragment of a parameter's weights or state, if it has one.

        updates   creates the state, at zero, of an optimizer that took this many steps
        """
        address = self._address(parameter, key)
        if address is None:
            return None
        optimizer: Any = self._engine.optimizer
        states: Any = optimizer.state if self._stage == 0 else optimizer.optimizer.state
        state: dict[str, Any] = {_WEIGHT: address.owner} if key == _WEIGHT else states[address.owner]
        if updates is not None:
            device = address.owner.device
            state.setdefault(key, torch.zeros(address.shape, dtype=torch.float32, device=device))
            if key != "momentum_buffer":
                state.setdefault("step", torch.tensor(float(updates), device=device))
        view = state[key].view(-1)[address.offset : address.offset + address.count]
        return _Fragment(view, address.start, address.contributes)

    def _address(self, parameter: Any, key: str) -> _Address | None:
        """Where DeepSpeed has this rank's fragment of a parameter's state, if it has one."""
        zero: Any = self._engine.optimizer
        if self._stage == 0:
            return _Address(parameter, parameter.shape, offset=0, start=0, count=parameter.numel())
        if self._stage == 3:
            group, offset, partition_size = zero.grad_position[zero.get_param_id(parameter)]
            owner, start = zero.fp32_partitioned_groups_flat[group], self._rank * partition_size
            count = max(0, min(partition_size, parameter.ds_numel - start))
            return _Address(owner, (owner.numel(),), offset, start, count)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        group = mapping.param_group_index
        owner = zero.single_partition_of_fp32_groups[group]
        in_parameter, in_owner = mapping.lp_fragment_address, mapping.hp_fragment_address
        if key != "momentum_buffer":
            return _Address(owner, (owner.numel(),), in_owner.start, in_parameter.start, in_parameter.numel)
        # Muon's states: full matrices, one after another, on every rank that owns a part of one.
        matrices = zero.params_in_partition[group]
        shape = (sum(matrix.numel() for matrix in matrices),)
        offset = sum(matrix.numel() for matrix in takewhile(lambda matrix: matrix is not parameter, matrices))
        return _Address(owner, shape, offset, 0, parameter.numel(), contributes=in_parameter.start == 0)


@dataclass(frozen=True)
class _Address:
    """Where a fragment of one parameter's optimizer state is."""

    owner: Tensor
    """The tensor by which the optimizer finds the state."""
    shape: tuple[int, ...]
    """Of the state of `owner`."""
    offset: int
    """Of the fragment in the flattened state."""
    start: int
    """Of the fragment in the flattened parameter."""
    count: int
    """Elements of the fragment."""
    contributes: bool = True
    """Whether this rank's fragment is part of a sum over ranks."""


@dataclass(frozen=True)
class _Fragment:
    """A contiguous part of one parameter's optimizer state."""

    state: Tensor
    """A view of DeepSpeed's tensor of states, or of weights."""
    start: int
    """Its offset in the flattened parameter."""
    contributes: bool
    """Whether it is part of a sum over ranks."""


def _deepspeed_muon(parameter_groups: list[optims.Group], optim: OptimConfig) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which orthogonalises matrices before they are sharded.

    Built here, because DeepSpeed's configuration would choose the matrices by their names.
    """
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

    DeepSpeed computes its norm after it has replaced gradients of matrices by their orthogonal updates, whose norms
    depend on their shapes only.
    """

    def __init__(self, zero: Any) -> None:
        self._zero, self._orthogonalise = zero, zero.get_flat_partition
        self._muon_square: Tensor | float = 0.0
        zero.get_flat_partition = self._measure_and_orthogonalise

    def _measure_and_orthogonalise(
        self, parameters: list[Any], *args: Any, param_group_idx: int, **options: Any
    ) -> Any:
        """DeepSpeed's get_flat_partition, after adding the squares of this rank's gradients."""
        zero, group = self._zero, param_group_idx
        if parameters and zero._is_muon_group(parameters):
            partition = dist.get_rank(zero.real_dp_process_group[group])
            starts, offsets = (
                table[group][partition] for table in (zero.grad_start_offset, zero.grad_partition_insertion_offset)
            )
            for parameter, gradient in zip(parameters, zero.all_grad_tensors[group], strict=True):
                start, offset = (int(table[zero.get_param_id(parameter)]) for table in (starts, offsets))
                end = start + min(parameter.numel() - start, int(zero.partition_size[group]) - offset)
                self._muon_square = self._muon_square + gradient.flatten()[start:end].float().square().sum()
        return self._orthogonalise(parameters, *args, param_group_idx=param_group_idx, **options)

    def read(self) -> Tensor:
        """(), fp32, over all ranks; call it once per step, before the optimizer."""
        zero = self._zero
        others = [
            gradient.float().square().sum()
            for group, gradients in zero.averaged_gradients.items()
            if gradients
            and not (zero.params_in_partition[group] and zero._is_muon_group(zero.params_in_partition[group]))
            for gradient in gradients
        ]
        local = torch.zeros((), device=zero.device) + self._muon_square + sum(others)
        self._muon_square = 0.0
        return sum_over_ranks(local).sqrt() / zero.loss_scale


def _full_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter, which under ZeRO-3 is an empty tensor."""
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape
