"""Which sizes of image a bundle makes: one, or any within ranges, where its graphs have axes for height and width."""

from collections.abc import Mapping
from dataclasses import dataclass

from piflow_edge.errors import ShapeError

from .sections import AxisSpec

# Named axes of states; and of what the decoder makes of them, a whole number of times as long.
HEIGHT, WIDTH = "height", "width"
IMAGE_HEIGHT, IMAGE_WIDTH = "image_height", "image_width"


@dataclass(frozen=True)
class OneSize:
    """The one size of a bundle's images, in pixels."""

    height: int
    width: int

    def check(self, bundle: str, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size; ShapeError for another one. None is what there is."""
        for name, given, has in (("height", height, self.height), ("width", width, self.width)):
            if given is not None and given != has:
                raise ShapeError(
                    f"bundle {bundle!r} makes images of one size, {self.width}x{self.height} pixels; leave height and "
                    f"width out; got {name}={given!r}"
                )
        return self.height, self.width

    def count_positions(self, height: int, width: int) -> int | None:
        """See `ImageSizes`; None: what depends on the size is recorded for this one."""
        return None


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of a bundle's images.

    Args:
        height, width: of states.
        factor: pixels of an image per place of a state, along each side.
        usual: height and width of an image where nothing is said.
    """

    height: AxisSpec
    width: AxisSpec
    factor: int
    usual: tuple[int, int]

    def state_size(self, bundle: str, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width of the states of an image of so many pixels; None is the usual number.

        Raises:
            ShapeError: the bundle makes no images of that size; the nearest that it makes are named.
        """
        given = [
            usual if side is None else side for side, usual in zip((height, width), self.usual, strict=True)
        ]
        axes = (self.height, self.width)
        if all(axis.has(side, self.factor) for axis, side in zip(axes, given, strict=True)):
            return given[0] // self.factor, given[1] // self.factor
        below, above = (
            "x".join(str(near(axis, side)) for axis, side in zip(axes, given, strict=True))
            for near in (self._nearest_below, self._nearest_above)
        )
        nearest = below if below == above else f"{below} and {above}"
        raise ShapeError(
            f"bundle {bundle!r} makes images {self.describe()} (height x width); got {given[0]}x{given[1]}; the "
            f"nearest: {nearest}"
        )

    def _nearest_below(self, axis: AxisSpec, side: int) -> int:
        return axis.nearest(side // self.factor) * self.factor

    def _nearest_above(self, axis: AxisSpec, side: int) -> int:
        below = self._nearest_below(axis, side)
        return below if below == side else axis.next_above(side, self.factor)

    def check(self, bundle: str, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the size of an image in pixels; errors as of `state_size`."""
        rows, columns = self.state_size(bundle, height, width)
        return rows * self.factor, columns * self.factor

    def count_positions(self, height: int, width: int) -> int:
        """Return H * W of the states of an image of so many pixels."""
        return (height // self.factor) * (width // self.factor)

    def describe(self) -> str:
        """Return the ranges in words."""
        sides = (axis.scaled(self.factor) for axis in (self.height, self.width))
        return " high and ".join(map(str, sides)) + " wide"


def read_sizes(
    axes: Mapping[str, AxisSpec], state_size: tuple[int, int], factor: int | None
) -> ImageSizes | None:
    """Return the sizes that named axes stand for; None where a bundle makes images of one size, or none.

    `factor`: None where there is no decoder; then sizes are those of the states.
    """
    if HEIGHT not in axes or WIDTH not in axes:
        return None
    pixels = factor or 1
    usual = (state_size[0] * pixels, state_size[1] * pixels)
    return ImageSizes(axes[HEIGHT], axes[WIDTH], pixels, usual)
