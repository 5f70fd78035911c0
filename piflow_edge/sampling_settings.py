"""The settings of a call, which request, recipe and command line share."""

from dataclasses import dataclass, fields, replace
from typing import Any

from .option import option

SOLVERS = ("euler", "multistep")


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled. None is what the bundle was exported with.

    Args:
        nfe: student calls per image. What is fixed in the student's policy stays.
        substeps: Euler steps over all of raw time.
        solver: "euler", as the student was trained, or "multistep"; see `rollout`.
        temperature: sharpens GM policies at every call but the last, 0 or more, where 1 leaves them as trained; "auto"
            is the published rule min(0.1 (nfe - 1), 1).
        h: strength of noise added between calls, 0 or more, or "inf"; see `Schedule`.
        strength: noise level to start from a given image at, above 0 and up to 1, where nothing is left of it. The
            calls above it are left out. None is 1 with a mask; without one it must be given with an image.
        resamples: with a mask, calls more for every call but the one at noise level 1, by which what is drawn comes to
            fit what is kept (RePaint, arXiv:2201.09865). None is 4, which few calls per image need.
        height, width: of an image in pixels.
    """

    nfe: int | None = option(None, "Network calls per image; else the bundle's.", minimum=1)
    substeps: int | None = option(None, "Euler steps of the policy; else the bundle's.", minimum=1)
    solver: str = option(
        "euler", "Euler as trained, or a quarter of the policy's evaluations.", choices=SOLVERS
    )
    temperature: float | str | None = option(
        None, "Of the mixture, 0 or more, or auto, the published rule for --nfe; else the bundle's."
    )
    h: float | str | None = option(
        None, "Strength of the noise added between calls, 0 or more, or inf; else the bundle's."
    )
    strength: float | None = option(None, "Noise level to start from --image at.", above=0, maximum=1)
    resamples: int | None = option(
        None, "More calls for each, by which what is drawn fits what --mask keeps; else 4.", minimum=0
    )
    height: int | None = option(None, "Of an image in pixels; else the bundle's.", minimum=1)
    width: int | None = option(None, "Of an image in pixels; else the bundle's.", minimum=1)

    def fill(self, **defaults: Any) -> "SamplingSettings":
        """Return these settings with `defaults` for those that are None."""
        missing = {}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                missing[name] = value
        return replace(self, **missing) if missing else self


SETTING_NAMES = tuple(field.name for field in fields(SamplingSettings))
