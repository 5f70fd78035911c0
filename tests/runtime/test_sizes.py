"""Sizes of a bundle's images: what is taken, what is refused with the nearest, and what follows the size."""

import math
from dataclasses import replace

import pytest

from piflow_edge.bundle.folder import Bundle, demo_bundle
from piflow_edge.bundle.sections import AxisSpec
from piflow_edge.bundle.sizes import ImageSizes
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.runtime.settings import complete_settings
from piflow_edge.sampling_settings import SamplingSettings
from piflow_edge.schedule import ShiftBySize

SIZES = ImageSizes(AxisSpec(32, 256, 2), AxisSpec(32, 256, 2), 8, (1024, 1024))


@pytest.mark.parametrize(
    ("height", "width", "state"),
    [(None, None, (128, 128)), (768, 1024, (96, 128)), (256, None, (32, 128)), (2048, 2048, (256, 256))],
)
def test_a_size_in_range_is_that_of_its_states(height, width, state):
    assert SIZES.state_size("x", height, width) == state


@pytest.mark.parametrize(
    ("height", "width", "nearest"),
    [
        (770, 1024, "768x1024 and 784x1024"),
        (1000, 1000, "992x992 and 1008x1008"),
        (100, 1024, "256x1024"),
        (4096, 1030, "2048x1024 and 2048x1040"),
    ],
)
def test_another_size_gets_the_nearest_there_are(height, width, nearest):
    with pytest.raises(ShapeError, match=f"256 to 2048, a multiple of 16 .*the nearest: {nearest}$"):
        SIZES.state_size("x", height, width)


@pytest.fixture(scope="module")
def manifest():
    """That of the digits, as if its network took several sizes with a shift for each."""
    found = Bundle(demo_bundle()).manifest
    sides = AxisSpec(4, 64, 2)
    schedule = replace(found.schedule, shift_by_size=ShiftBySize(16, 256, 0.5, 1.15, places=4))
    return replace(found, axes={**found.axes, "height": sides, "width": sides}, schedule=schedule)


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(8, 8, 16), (32, 32, 256), (16, 64, 256), (64, 64, 1024)]
)
def test_the_shift_follows_the_size(manifest, height, width, tokens):
    given = SamplingSettings(nfe=4, height=height, width=width)
    settings, schedule = complete_settings(given, manifest, has_image=False, has_mask=False)
    # mu of FLUX's scheduler: a straight line in the number of tokens.
    mu = 0.5 + (tokens - 16) * (1.15 - 0.5) / (256 - 16)
    assert schedule.shift == pytest.approx(math.exp(mu), rel=1e-12)
    assert (settings.height, settings.width) == (height, width)
    assert manifest.state_shape(height, width) == (1, height, width)


def test_a_side_that_is_no_whole_number_is_refused(manifest):
    with pytest.raises(ScheduleError, match=r"height is a whole number, 1 or more; got 8\.5"):
        complete_settings(SamplingSettings(height=8.5), manifest, has_image=False, has_mask=False)
