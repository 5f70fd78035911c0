"""The processes that train together, through HF accelerate: one, or as many as `accelerate launch` started."""

import atexit
import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, convert_outputs_to_fp32, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from piflow_edge.distill.networks.activations import quicken
from piflow_edge.errors import EngineError, PiFlowError, ShapeError

T = TypeVar("T")

PRECISIONS = ("no", "bf16", "fp16")
_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


class Processes:
    """One network on all processes: alike on each (DDP), or a share of its weights on each (FSDP).

    Args:
        mixed_precision: "no", "bf16" or "fp16"; None is what `accelerate launch` was told, else "no".
        parts: pieces in which each process takes its share of a batch, one after the other, 1 or more.

    Raises:
        EngineError: a precision or a way of sharing that cannot run here.
    """

    def __init__(self, mixed_precision: str | None = None, parts: int = 1):
        # Looking for unused parameters also keeps DDP from changing, after the first step, the order it sums gradients
        # in: a resumed run would take that first step in the middle, and differ in the last bits.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        try:
            self.accelerator = Accelerator(
                mixed_precision=mixed_precision,
                gradient_accumulation_steps=parts,
                cpu=not torch.accelerator.is_available(),
                kwargs_handlers=[ddp],
            )
        except (ValueError, ImportError) as error:
            raise EngineError(f"accelerate cannot run in this way here: {error}") from error
        self.device, self.count = self.accelerator.device, self.accelerator.num_processes
        self.index, self.is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.mixed_precision = self.accelerator.mixed_precision
        if self.device.type == "cpu":
            keep_memory()
        self.sharded = self.accelerator.is_fsdp2  # no process can call the network alone
        self.parts = self.accelerator.gradient_accumulation_steps
        kind = self.accelerator.distributed_type
        if kind in _UNSUPPORTED:
            raise EngineError(
                f"training is for one device, DDP or FSDP; accelerate is set up for {kind.value}"
            )
        if kind == DistributedType.FSDP and not self.sharded:
            raise EngineError("of FSDP only version 2 is supported; give accelerate launch --fsdp_version 2")
        if not self.sharded and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise EngineError(
                f"FSDP was asked for, and accelerate shares nothing out on {self.device.type!r}"
            )
        if self.mixed_precision not in PRECISIONS:
            raise EngineError(
                f"mixed precision is one of {', '.join(PRECISIONS)}; got {self.mixed_precision!r}"
            )
        if self.mixed_precision == "fp16" and self.accelerator.scaler is None:
            raise EngineError(f"fp16 needs a GPU, and this is {self.device.type!r}; bf16 runs here")

    def share(self, batch_size: int) -> list[slice]:
        """The rows of a batch that are this process's, piece by piece.

        Raises:
            ShapeError: the batch cannot be cut into equal pieces.
        """
        if batch_size % (self.count * self.parts):
            raise ShapeError(
                f"a batch is cut into equal pieces; {batch_size} images cannot go to {self.count} processes in "
                f"{self.parts} pieces each: make batch_size a multiple of {self.count * self.parts}"
            )
        size = batch_size // (self.count * self.parts)
        first = self.index * self.parts * size
        return [slice(first + part * size, first + (part + 1) * size) for part in range(self.parts)]

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Put the network on this process's device; what to call in its place. The optimizer follows suit."""
        quicken(network)
        halved = self.mixed_precision != "no"
        if self.sharded and halved:
            # The times that a network is given do not survive half precision. So inputs stay as they are, and
            # autocast decides by operation, as it does without FSDP; gradients are summed in float32.
            dtype = torch.bfloat16 if self.mixed_precision == "bf16" else torch.float16
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        with warnings.catch_warnings():  # torch has renamed what accelerate still calls by its old name
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            prepared, _ = self.accelerator.prepare(network, optimizer)
        if self.sharded and halved:
            self._autocast(prepared)
        return prepared

    def place(self, network: nn.Module) -> None:
        """Put a network that is not trained on this process's device, to be called in the run's precision."""
        network.to(self.device)
        quicken(network)
        if self.mixed_precision != "no" and not hasattr(network, "_original_forward"):
            self._autocast(network)

    def _autocast(self, network: Any) -> None:
        network._original_forward = forward = network.forward

        def in_half(*inputs, **named):
            with self.accelerator.autocast():
                return forward(*inputs, **named)

        network.forward = convert_outputs_to_fp32(in_half)

    def syncing(self, prepared: nn.Module, last: bool) -> AbstractContextManager:
        """Where gradients are taken: they are summed over the processes with the last piece of a batch only."""
        return nullcontext() if last else self.accelerator.no_sync(prepared)

    def mean(self, *values: Tensor | float) -> list[float]:
        """Each number's mean over the processes, the same bits on all of them."""
        sums = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values])
        if self.count > 1:
            dist.all_reduce(sums)
        return [value / self.count for value in sums.tolist()]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main process, on all; they wait for it. An error there is raised on all."""
        if self.count == 1:
            return make()
        outcome: list = [None]
        if self.is_main:
            try:
                outcome = [make()]
            except (PiFlowError, OSError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, device=self.device)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def differ(self, value: str) -> bool:
        """Whether the processes do not all hold the same text."""
        return self.count > 1 and len(set(gather_object([value]))) > 1

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may hold a share, whole and in host memory. All must ask together."""
        tensor = tensor.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()

    def receive(self, tensor: Tensor | None, like: Tensor) -> Tensor:
        """The main process's `tensor`, shared out as `like` is, with its dtype and device. All must ask together."""
        if self.count == 1:
            assert tensor is not None
            return tensor.to(like)
        whole = torch.empty(like.shape, dtype=like.dtype, device=self.device)
        if tensor is not None:
            whole.copy_(tensor)
        dist.broadcast(whole, 0)
        if isinstance(like, DTensor):
            whole = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return whole

    def end(self) -> None:
        """Let the processes part in good order when Python ends."""
        if self.count > 1:
            atexit.unregister(_part)
            atexit.register(_part)


def keep_memory() -> None:
    """Let the C library keep what is freed, up to 512 MB, instead of handing it back to the system.

    By default glibc returns blocks of a few MB, and the next step's first touch of each page is a fault: 7,000 a step
    on the demo, a tenth of its time or more. For training on a CPU; with another C library it does nothing.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its maximum


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's share of each tensor: the tensor itself, where it is not shared out."""
    return [t._local_tensor if isinstance(t, DTensor) else t for t in (t.detach() for t in tensors)]


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
