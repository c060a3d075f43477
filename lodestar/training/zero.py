"""DeepSpeed's ZeRO, stages 0 to 3, as an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lodestar.config.schema import EngineConfig, OptimConfig, Precision
from lodestar.distributed.collectives import sum_over_ranks
from lodestar.distributed.runtime import Runtime, prepare_deepspeed
from lodestar.errors import ConfigError
from lodestar.training import optim as optims
from lodestar.training.engine import Autocast, Resumed, StepReport, state_tensor


class ZeroEngine:
    """DeepSpeed: optimizer states (1), gradients (2), parameters (3) sharded over ranks; 0 shards nothing."""

    def __init__(
        self,
        module: nn.Module,
        runtime: Runtime,
        section: EngineConfig,
        optim: OptimConfig,
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
            "train_micro_batch_size_per_gpu": 1,  # unused: local losses are summed by us
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
        inner: nn.Module = Autocast(module, runtime.device, "bf16") if precision == "bf16" else module
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

    def backward(self, local_loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        with optims.muon_in_fp32(self._muon_fp32):  # ZeRO-1 and 2 orthogonalise here
            self._engine.backward(local_loss * self._world_size, scale_wrt_gas=False)

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
                value = state_tensor(name, key, checkpoint.optimizer)
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


def _deepspeed_muon(parameter_groups: list[optims.Group], optim: OptimConfig) -> torch.optim.Optimizer:
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
