"""torch's DistributedDataParallel as an engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lodestar.config.schema import OptimConfig, Precision
from lodestar.distributed.runtime import Runtime
from lodestar.training import optim as optims
from lodestar.training.engine import Autocast, ResumeState, StepReport, state_tensor
from lodestar.training.host_memory import HostMemory


class DdpEngine:
    """DistributedDataParallel: weights, gradients and optimizer states are whole on every rank."""

    def __init__(
        self, module: nn.Module, runtime: Runtime, optim: OptimConfig, precision: Precision, muon_fp32: bool
    ) -> None:
        self.module, self._muon_fp32 = module, muon_fp32
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self._world_size, self._is_main = runtime.world_size, runtime.is_main
        self._wrapped: nn.Module = Autocast(module, runtime.device, precision)
        if runtime.world_size > 1:
            for message in ("find_unused_parameters=True was specified", "`broadcast_buffers` is deprecated"):
                warnings.filterwarnings("ignore", message=message)
            self._wrapped = DistributedDataParallel(
                self._wrapped,
                device_ids=[runtime.device] if runtime.device.type == "cuda" else None,
                broadcast_buffers=False,
                # Without it DDP changes its buckets after the first step, and with them the order of sums: the first
                # step of a resumed run would differ in the last bit.
                find_unused_parameters=True,
            )
            # Outlives DDP: were the last reference that of DDP's C++ reducer, it would join gloo's threads while it
            # holds the GIL, for which one of them may wait.
            self._group = self._wrapped.process_group
        self._clip_norm = optim.clip_norm
        parameter_groups = optims.groups(module, optim)
        adamw_groups = [group for group in parameter_groups if not group["use_muon"]]
        muon_groups = [group for group in parameter_groups if group["use_muon"]]
        self._adamw = optims.adamw(adamw_groups, optim)
        self._optimizers: list[tuple[torch.optim.Optimizer, tuple[str, ...]]] = [
            (self._adamw, ("exp_avg", "exp_avg_sq"))
        ]
        if muon_groups:
            self._optimizers.append((optims.muon(muon_groups, optim), ("momentum_buffer",)))
        # The loss scale is a power of two: it keeps fp16 gradients from underflow and does not round them.
        self._scale = 2.0**16 if precision == "fp16" else 1.0
        self._fixed_scale, self._good_steps = precision != "fp16", 0

    def _reduced_if(self, last: bool) -> AbstractContextManager[Any]:
        """Only the last backward of a step reduces gradients over ranks."""
        wrapped = self._wrapped
        return nullcontext() if last or not isinstance(wrapped, DistributedDataParallel) else wrapped.no_sync()

    def run(self, *inputs: Any, last: bool) -> Any:
        with self._reduced_if(last):
            return self._wrapped(*inputs)

    def backward(self, local_loss: Tensor, *, last: bool) -> None:
        with self._reduced_if(last):
            (local_loss * (self._world_size * self._scale)).backward()

    def step(self, lr_factor: float) -> StepReport:
        parameters = [p for p in self._names if p.grad is not None]
        if self._scale != 1.0:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / self._scale)
        norm = nn.utils.clip_grad_norm_(parameters, self._clip_norm or math.inf)
        finite = torch.isfinite(norm)
        # Under fp16 the host must know, for the next loss scale; else nothing here waits for the device.
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
        self._adamw.found_inf = (~finite).float()  # type: ignore[attr-defined]  # fused AdamW skips the update by it, without a synchronisation
        self._adamw.grad_scale = None  # type: ignore[attr-defined]
        self._adamw.step()
        for optimizer, _ in self._optimizers[1:]:
            # torch's Muon cannot be told on the device to skip a step, and undoing one would take a copy of weights and
            # momentum: so the host waits for this one number.
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

    def weights(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {name: parameter for parameter, name in self._names.items()}
        return self._copied("weights", tensors, memory)

    def optimizer_state(self, memory: HostMemory | None = None) -> dict[str, Tensor]:
        tensors = {
            f"{self._names[cast(nn.Parameter, parameter)]}:{key}": state[key]
            for optimizer, keys in self._optimizers
            for parameter, state in optimizer.state.items()
            for key in keys
        }
        return self._copied("optimizer", tensors, memory)

    def _copied(self, group: str, tensors: Mapping[str, Tensor], memory: HostMemory | None) -> dict[str, Tensor]:
        return (memory or HostMemory()).copy(group, tensors) if self._is_main else {}

    def values(self) -> dict[str, float]:
        return {"loss_scale": self._scale, "good_steps": self._good_steps}

    def resume(self, checkpoint: ResumeState) -> None:
        for optimizer, keys in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name, device = self._names[parameter], parameter.device
                    state = {key: state_tensor(name, key, checkpoint.optimizer).to(device) for key in keys}
                    if optimizer is self._adamw:
                        state["step"] = torch.tensor(float(checkpoint.updates), device=device)
                    optimizer.state[parameter] = state
        if not self._fixed_scale:
            self._scale = checkpoint.values.get("loss_scale", self._scale)
            self._good_steps = int(checkpoint.values.get("good_steps", 0))
