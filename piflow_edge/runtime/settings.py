"""The settings of a call: what a caller leaves open is the bundle's, and what makes no sense is refused."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from piflow_edge.bundle.manifest import Manifest
from piflow_edge.bundle.sections import ScheduleSpec
from piflow_edge.bundle.sizes import ImageSizes, OneSize
from piflow_edge.errors import ScheduleError, ShapeError, UsageError
from piflow_edge.option import find_options
from piflow_edge.sampling_settings import SETTING_NAMES, SamplingSettings
from piflow_edge.schedule import Schedule, check_temperature

from .arguments import check_whole

# Of inpainting. On Gaussian data with 4 calls the seam is 2.5 times as rough as the data without, 1.5 times with 4.
_RESAMPLES = 4
_OPEN = SamplingSettings()
_RANGES = find_options(SamplingSettings)
# What a generator's call takes besides settings.
CALL_ARGUMENTS = ("subject", "count", "seed", "labels", "prompt", "arrays", "settings", "noise", "image", "mask",
                  "output", "callback", "callback_every", "cancel", "synchronize")  # fmt: skip
# What other libraries call it, and what to do here instead.
_ELSEWHERE = {
    "num_inference_steps": "give nfe, the student's calls per image",
    "steps": "give nfe, the student's calls per image",
    "guidance_scale": "the student was distilled from a guided teacher, so there is no guidance to set here",
    "negative_prompt": "guidance is part of the student since it was distilled, and not with negative prompts: "
    "say in the prompt what you want to see",
    "generator": "give seed, a whole number",
    "latents": "give noise, an array (B, C, H, W)",
    "num_images_per_prompt": "give count",
    "output_type": "give output, such as 'pil' or 'numpy'",
    "callback_on_step_end": "give callback, a function that takes a Progress",
    "mask_image": "give mask",
    "prompt_embeds": "give arrays, by the names of the network's inputs",
}


def suggest_ours(name: str) -> str | None:
    """Return what to give instead of what other libraries call `name`, or None."""
    return _ELSEWHERE.get(name)


def change_settings(settings: SamplingSettings | None, changes: Mapping[str, Any]) -> SamplingSettings:
    """Return `settings` with the keyword arguments of a call, of which None changes nothing.

    Raises:
        UsageError: a keyword that is no setting; it says what ours is called.
    """
    if settings is not None and not isinstance(settings, SamplingSettings):
        raise UsageError(f"settings is a SamplingSettings, such as SamplingSettings(nfe=2); got {settings!r}")
    for name in changes:
        if name not in SETTING_NAMES:
            import difflib  # late: only errors need it

            near = difflib.get_close_matches(name, (*CALL_ARGUMENTS, *SETTING_NAMES), n=1)
            hint = suggest_ours(name) or (
                f"did you mean {near[0]}?" if near else f"settings are {', '.join(SETTING_NAMES)}"
            )
            raise UsageError(f"a generator's call has no argument {name!r}; {hint}")
    given = {name: value for name, value in changes.items() if value is not None}
    settings = settings or _OPEN
    return replace(settings, **given) if given else settings


def complete_settings(
    settings: SamplingSettings, manifest: Manifest, *, has_image: bool, has_mask: bool
) -> tuple[SamplingSettings, Schedule]:
    """Return the settings with nothing left open, and the schedule that they make.

    Raises:
        ScheduleError: a setting out of range, or without what it is for.
        ShapeError: another size of image than the bundle makes.
    """
    bundle = (manifest.name, manifest.schedule, manifest.image_sizes)
    try:
        # Field by field, so that types are compared too: True is no number of calls, but is equal to 1.
        return _cached_completion(*bundle, has_image, has_mask, *vars(settings).values())
    except TypeError:  # a list cannot be looked up; what it says is for `_complete` to judge
        return _complete(*bundle, has_image, has_mask, *vars(settings).values())


def _complete(
    name: str,
    spec: ScheduleSpec,
    sizes: ImageSizes | OneSize | None,
    has_image: bool,
    has_mask: bool,
    *fields: Any,
) -> tuple[SamplingSettings, Schedule]:
    """See `complete_settings`. `name`, `spec` and `sizes`: the bundle's, its schedule's and those of its images."""
    settings = SamplingSettings(*fields)
    height, width = _check_size(settings, name, sizes)
    if sizes is not None and height and width:
        spec = spec.at_size(sizes.count_positions(height, width))
    schedule = _make_schedule(spec, settings)
    if not (solvers := _RANGES["solver"]).allows(settings.solver):
        raise ScheduleError(f"solver is {solvers.describe_range()}; got {settings.solver!r}")
    _check_whole_setting("resamples", settings)
    if settings.resamples and not has_mask:
        raise ScheduleError("resamples are for inpainting; give a mask, or leave them out")
    resamples = settings.resamples if settings.resamples is not None else _RESAMPLES if has_mask else 0
    completed = SamplingSettings(
        nfe=int(schedule.nfe),
        substeps=int(schedule.total_substeps),
        solver=settings.solver,
        temperature=_temperature(spec, settings.temperature, schedule.nfe),
        h="inf" if math.isinf(float(schedule.h)) else float(schedule.h),  # JSON has no infinity
        strength=_strength(settings.strength, has_image, has_mask, schedule.nfe),
        resamples=int(resamples),
        height=height,
        width=width,
    )
    return completed, schedule


# Calls mostly come with the same settings.
_cached_completion = lru_cache(maxsize=64, typed=True)(_complete)


def describe_untrained(
    settings: SamplingSettings, schedule: Schedule, spec: ScheduleSpec, trained_nfes: Sequence[int]
) -> str | None:
    """Return what a student of `spec` was not trained for in a request; None for nothing.

    `trained_nfes`: the calls per image that it was trained for.
    """
    nfe, strength = int(schedule.nfe), settings.strength
    if nfe not in trained_nfes and not (spec.or_more and nfe > max(trained_nfes)):
        plural = "s" * (list(trained_nfes) != [1])
        numbers = " or ".join(map(str, trained_nfes)) + " or more" * spec.or_more
        return f"was trained for {numbers} call{plural} per image and runs with {nfe}"
    if strength in (None, 1):
        return None
    levels = [_make_schedule(spec, SamplingSettings(nfe=each)).sigmas for each in trained_nfes]
    if any(np.isclose(strength, sigmas).any() for sigmas in levels):
        return None
    named = ", ".join(f"{sigma:.3g}" for sigma in schedule.sigmas[:-1])
    return f"was trained to be called at noise levels {named} and starts at {strength:.3g}"


def _check_size(
    settings: SamplingSettings, bundle: str, sizes: ImageSizes | OneSize | None
) -> tuple[int | None, int | None]:
    _check_whole_setting("height", settings)
    _check_whole_setting("width", settings)
    if sizes is not None:
        return sizes.check(bundle, settings.height, settings.width)
    for name in ("height", "width"):
        if (given := getattr(settings, name)) is not None:
            raise ShapeError(
                f"bundle {bundle!r} makes no images; leave height and width out; got {name}={given!r}"
            )
    return None, None


def _check_whole_setting(name: str, settings: SamplingSettings) -> None:
    check_whole(name, getattr(settings, name), int(_RANGES[name].minimum or 0))


def _make_schedule(spec: ScheduleSpec, settings: SamplingSettings) -> Schedule:
    """The bundle's schedule, with what is not None instead of its own."""
    changes = {"nfe": settings.nfe, "total_substeps": settings.substeps, "h": settings.h}
    return spec.schedule(**{name: value for name, value in changes.items() if value is not None})


def _temperature(spec: ScheduleSpec, temperature: Any, nfe: int) -> float:
    """The bundle's temperature for None."""
    if temperature is not None:
        check_temperature(temperature)
        spec = replace(spec, temperature=temperature)
    return float(spec.temperature_of(nfe))


def _strength(strength: Any, has_image: bool, has_mask: bool, nfe: int) -> float:
    """The noise level to start at, in (0, 1]."""
    if not has_image and strength not in (None, 1):
        raise ScheduleError("strength says at which noise level to start from an image; give the image too")
    if has_image and strength is None and not has_mask:
        raise ScheduleError(
            "to start from an image, give the strength: the noise level to start at, above 0 and up to 1, where "
            "nothing is left of it"
        )
    if strength is None:
        strength = 1.0
    elif not (isinstance(strength, numbers.Real) and _RANGES["strength"].allows(float(strength))):
        raise ScheduleError(f"strength is {_RANGES['strength'].describe_range()}; got {strength!r}")
    if has_mask and strength == 1 and nfe == 1:
        raise ScheduleError(
            "with one call at noise level 1 the student sees nothing of what a mask keeps; give nfe of 2 or more, or a "
            "strength below 1"
        )
    return float(strength)
