"""What training changes and a checkpoint holds: weights, their average, Adam's moments, and a few counts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from piflow_edge.errors import CheckpointError

from .processes import Processes, local

# What wrappers put into the names of parameters.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_ADAM = ("step", "exp_avg", "exp_avg_sq")


class State:
    """A network in training. Only parameters with `requires_grad` are trained, averaged and saved.

    Args:
        network: what to train; put on its device, and under FSDP cut into shares, in place.
        processes: that train together.

    `prepared` is what a loss calls. `skipped`: steps that were not taken; `skipped_in_a_row`: the last ones.
    """

    def __init__(self, network: nn.Module, processes: Processes):
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()  # Adam's steps and the average are lost on half precision
        self.network, self.processes = network, processes
        self.optimizer = torch.optim.Adam(trained, betas=(0.9, 0.95), fused=True)
        self.prepared = processes.prepare(network, self.optimizer)
        self.parameters = {_plain(k): p for k, p in network.named_parameters() if p.requires_grad}
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.skipped = self.skipped_in_a_row = 0

    def clip(self, max_norm: float) -> Tensor:
        """Shorten gradients longer than `max_norm`; the length they had, over all processes."""
        norm: Any = self.processes.accelerator.clip_grad_norm_(self.parameters.values(), max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, learning_rate: float, decay: float) -> None:
        """One step of Adam; then the average moves towards the weights by `1 - decay`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]  # what torch's own averaging calls
            local(self.ema.values()), local(self.parameters.values()), 1 - decay
        )
        self.skipped_in_a_row = 0
        self._adjust_scale()

    def skip(self) -> None:
        """Leave weights, moments and average as they are, and count that."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._adjust_scale()

    def _adjust_scale(self) -> None:
        # fp16's gradients are scaled up, by less after one that was not finite: `clip` has found that out.
        if (scaler := self.processes.accelerator.scaler) is not None:
            scaler.update()

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, whole and in host memory. All processes must call this together."""
        named = {f"ema.{k}": v for k, v in self.ema.items()}
        named |= {f"raw.{k}": v for k, v in self.parameters.items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})  # nothing before its first step
            named |= {f"adam.{part}.{name}": value for part, value in moments.items()}
        tensors = {name: self.processes.whole(value) for name, value in named.items()}
        tensors["run.skipped"] = torch.tensor([self.skipped, self.skipped_in_a_row])
        if (scaler := self.processes.accelerator.scaler) is not None:
            tensors["run.loss_scale"] = torch.tensor(
                [scaler.get_scale(), scaler._get_growth_tracker()], dtype=torch.float64
            )
        return tensors

    def restore(self, tensors: dict[str, Tensor], names: Iterable[str]) -> None:
        """Take over what `tensors` gave. All processes must call this together; the tensors are the main one's.

        Args:
            tensors: as from `tensors`; may be empty on all processes but the main one.
            names: of the tensors, on every process.

        Raises:
            CheckpointError: they are not this network's, or not enough to train further.
        """
        names = set(names)
        expected = {f"{kind}.{name}" for name in self.parameters for kind in ("ema", "raw")}
        if not any(name.startswith("raw.") for name in names):
            raise CheckpointError(
                "the checkpoint holds averaged weights only; it can be used but not trained further"
            )
        if odd := sorted(expected ^ {name for name in names if name.startswith(("ema.", "raw."))}):
            raise CheckpointError(
                f"the checkpoint is of another architecture: {odd[0]!r} is on one side only ({len(odd)} such "
                "tensors); go on with the network the run was started with"
            )

        def receive(name: str, like: Tensor) -> Tensor:
            return self.processes.receive(tensors.get(name), like)

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(receive(f"raw.{name}", parameter))
                self.ema[name].copy_(receive(f"ema.{name}", parameter))
                if f"adam.exp_avg.{name}" in names:  # absent when it was saved before the first step
                    count = torch.zeros((), device=self.processes.device)
                    self.optimizer.state[parameter] = {
                        part: receive(f"adam.{part}.{name}", count if part == "step" else parameter)
                        .detach()
                        .clone()
                        for part in _ADAM
                    }
        if "run.skipped" in names:
            counts = receive("run.skipped", torch.zeros(2, dtype=torch.int64, device=self.processes.device))
            self.skipped, self.skipped_in_a_row = counts.tolist()
        if (scaler := self.processes.accelerator.scaler) is not None and "run.loss_scale" in names:
            like = torch.zeros(2, dtype=torch.float64, device=self.processes.device)
            scale, tracker = receive("run.loss_scale", like).tolist()
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})

    @contextmanager
    def use_averages(self) -> Iterator[nn.Module]:
        """The network with its averaged weights, for as long as the block runs; to be called as it is, ungathered."""
        self._swap()
        self.network.eval()
        try:
            with torch.no_grad():
                yield self.network
        finally:
            for module in self.network.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # or the next step would find the average where it expects weights
            self.network.train()
            self._swap()

    def _swap(self) -> None:
        for weights, average in zip(local(self.parameters.values()), local(self.ema.values()), strict=True):
            copy = weights.clone()
            weights.copy_(average)
            average.copy_(copy)


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
