"""Looking on while images are drawn: how far it is, a preview, and a way to stop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np

from piflow_edge.arrays import Array, SameArray
from piflow_edge.errors import Cancelled, ScheduleError
from piflow_edge.integrator import Integrate, integrate
from piflow_edge.policies import Policy
from piflow_edge.runtime.arguments import check_whole

from .inpainting import KeptImage

# Substeps between two looks at whether to go on. Cutting a rollout costs some 20 microseconds a piece.
_WATCHED_SUBSTEPS = 16


class Event(Protocol):
    """What says that a call is to stop, such as `threading.Event`."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class Progress:
    """How far the sampler is, for a callback.

    `call`: student calls made for these images so far, of `nfe`; `substep`, of `substeps`: Euler steps done in the
    segment of the last one. `sigma_t`: the noise level. `first`: number of the first of these images within the whole
    call, which may be made in pieces. `state`, `policy`, `kept_image`, `integrate`: what `x_t` and `x_0` are made of.
    """

    call: int
    nfe: int
    substep: int
    substeps: int
    sigma_t: float
    state: Array
    policy: Policy
    kept_image: KeptImage | None = None
    first: int = 0
    integrate: Integrate = integrate

    @cached_property
    def x_t(self) -> Array:
        """The state, (B, C, H, W), in the host's memory."""
        return _on_host(self.state)

    @cached_property
    def x_0(self) -> Array:
        """What the policy now takes the clean latents for, (B, C, H, W): worked out when asked for, no network call."""
        # The Euler step down to 0 ends in x_t - sigma_t u_t, which is the estimate; so every kernel can give it.
        levels = np.array([self.sigma_t, 0.0])
        x_0 = self.integrate(self.policy, self.state, levels) if self.sigma_t > 0 else self.state
        return _on_host(x_0 if self.kept_image is None else self.kept_image.finish(x_0))


@dataclass(frozen=True)
class Observer:
    """Who looks on: see `callback`, `callback_every` and `cancel` of a `Generator`'s call.

    Raises:
        ScheduleError: something that cannot look on.
    """

    callback: Callable[[Progress], None] | None = None
    every: int | None = None
    cancel: Event | None = None

    def __post_init__(self):
        callback, cancel = self.callback, self.cancel
        if callback is not None and not callable(callback):
            raise ScheduleError(f"callback is a function that takes a Progress; got {callback!r}")
        check_whole("callback_every", self.every, 1)
        if self.every is not None and callback is None:
            raise ScheduleError("callback_every says when to call a callback; give the callback too")
        if cancel is not None and (isinstance(cancel, type) or not callable(getattr(cancel, "is_set", None))):
            raise ScheduleError(f"cancel is a threading.Event, or what has its is_set(); got {cancel!r}")

    @property
    def is_watching(self) -> bool:
        return self.callback is not None or self.cancel is not None


NOBODY = Observer()


def build_observer(
    callback: Callable[[Progress], None] | None, every: int | None, cancel: Event | None
) -> Observer:
    """Return the `Observer` of a call's arguments; mostly that is `NOBODY`."""
    return (
        NOBODY if callback is None and every is None and cancel is None else Observer(callback, every, cancel)
    )


class Watch:
    """One loop's observer: wraps its network and its integration to count calls, report, and stop.

    `nfe`: calls that the loop is going to make. `integrate`, `kept_image`, `first`: for the reports, as in `Progress`.
    """

    def __init__(
        self,
        observer: Observer,
        nfe: int,
        integrate: Integrate,
        kept_image: KeptImage | None = None,
        first: int = 0,
    ):
        self._observer, self._nfe, self._kept_image, self._first = observer, nfe, kept_image, first
        self._preview = integrate
        self._calls = 0

    def wrap_network(self, network: Callable[[Array, float], Policy]) -> Callable[[Array, float], Policy]:
        """Return the network; it counts its calls, and stops before one where that was asked for."""

        def call_watched(x_t: Array, sigma_src: float) -> Policy:
            self._check(sigma_src)
            policy = network(x_t, sigma_src)
            self._calls += 1
            return policy

        return call_watched

    def wrap_integrate(self, integrate: Integrate, *, report: bool) -> Integrate:
        """Return the integration; it is cut where to look on, and calls the callback if `report`."""
        callback, every = (self._observer.callback, self._observer.every) if report else (None, None)

        def call_watched(policy: Policy, x_t: Array, sigmas: np.ndarray, *, solver: str) -> Array:
            substeps = len(sigmas) - 1
            looks = _WATCHED_SUBSTEPS if self._observer.cancel is not None and solver == "euler" else None
            for start, stop in _cuts(substeps, every, looks):
                whole = stop - start == substeps
                x_t = integrate(policy, x_t, sigmas if whole else sigmas[start : stop + 1], solver=solver)
                sigma_t = float(sigmas[stop])
                if callback is not None and (stop == substeps or (every and stop % every == 0)):
                    done = (self._calls, self._nfe, stop, substeps, sigma_t)
                    callback(Progress(*done, x_t, policy, self._kept_image, self._first, self._preview))
                self._check(sigma_t)
            return x_t

        return call_watched

    def _check(self, sigma_t: float) -> None:
        if self._observer.cancel is not None and self._observer.cancel.is_set():
            raise Cancelled(
                f"stopped at noise level {sigma_t:.3g} after {self._calls} network calls, as was asked for"
            )


def _on_host(array: SameArray) -> SameArray:
    return array.to_host() if hasattr(array, "to_host") else array


def _cuts(substeps: int, *every: int | None) -> Iterator[tuple[int, int]]:
    """(first substep, where to stop) of the pieces of a segment, cut after every so many substeps."""
    stops = {stop for size in every if size is not None for stop in range(size, substeps, size)}
    return pairwise([0, *sorted(stops), substeps])
