"""Memory of a build: what it needs at the very least, whether there is as much, and what it took."""

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Any

from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia
from piflow_edge.system.hardware import held_memory


@dataclass(frozen=True)
class Memory:
    """Bytes that a build takes at the very least, and what is free; None where this machine does not tell.

    The GPU holds the weights twice (as read, and in the kernels' own layout), the inputs and outputs of the largest
    batch, and the workspace where one is named; the host holds the graph as a file, as read and as the finished engine.
    Where both are one memory, as on Jetson, the sum must fit.
    """

    device_needed: int
    host_needed: int
    device_free: int | None = None
    host_free: int | None = None
    is_shared: bool = False

    def check(self, name: str) -> None:
        """Refuse a build that cannot fit.

        Raises:
            EngineError: there is less memory than needed.
        """
        pools = {
            "the GPU": (self.device_needed, self.device_free),
            "this machine": (self.host_needed, self.host_free),
        }
        if self.is_shared:
            pools = {
                "this machine, whose GPU shares it,": (
                    self.device_needed + self.host_needed,
                    self.device_free,
                )
            }
        for where, (needed, free) in pools.items():
            if free is not None and needed > free:
                raise EngineError(
                    f"building the {name} needs {_mib(needed)} of memory at the very least, and {where} has "
                    f"{_mib(free)} free: end other programs, name a smaller --workspace, or a smaller --batch"
                )


class Watch:
    """Time, and peaks of memory: looked at twenty times a second, for no library tells of its builder's."""

    def __init__(self, ordinal: int):
        self._ordinal, self._over = ordinal, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._host: list[int] = []
        self._device: list[int] = []

    def __enter__(self) -> "Watch":
        self._began = time.perf_counter()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._seconds = time.perf_counter() - self._began
        self._sample()
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        if (resident := held_memory()) is not None:
            self._host.append(resident)
        with contextlib.suppress(EngineError):
            free, total = nvidia.memory(self._ordinal)
            self._device.append(total - free)

    def facts(self) -> dict[str, Any]:
        """Seconds; bytes at the peak: of this process on the host, and of the GPU above what it held before."""
        return {
            "seconds": round(self._seconds, 3),
            "peak_host_bytes": max(self._host, default=None),
            "peak_device_bytes": max(self._device) - self._device[0] if self._device else None,
        }


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
