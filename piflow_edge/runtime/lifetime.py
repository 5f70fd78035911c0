"""When an opened bundle's memory is freed: once it is closed and no call needs it any more."""

import threading
from collections.abc import Callable

from piflow_edge.errors import EngineError


class Lifetime:
    """Counts the calls that are running, from any thread. A `with` block is a call.

    `name`: of the bundle, for errors. `free`: is called once, by `close` or at the end of the last call after it.
    """

    def __init__(self, name: str, free: Callable[[], None]):
        self._name, self._free = name, free
        self._lock, self._running, self._is_closed = threading.Lock(), 0, False

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *exception: object) -> None:
        self.end()

    def begin(self, *, within_call: bool = False) -> None:
        """Begin a call; EngineError after `close`, but `within_call` only once no other call is running."""
        with self._lock:
            if self._is_closed and not (within_call and self._running):
                raise EngineError(f"the generator of {self._name!r} is closed; load the bundle again")
            self._running += 1

    def end(self) -> None:
        """End a call, and free the memory if it was the last one after `close`."""
        with self._lock:
            self._running -= 1
            is_last = self._is_closed and not self._running
        if is_last:
            self._free()

    def close(self) -> None:
        """Refuse more calls, and free the memory, at once or when the calls that are running are done."""
        with self._lock:
            is_idle = not self._is_closed and not self._running
            self._is_closed = True
        if is_idle:
            self._free()
