"""Plots drawn with Pillow, which the runtime has anyway: points and lines over two axes, and stacked bars."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

# Drawn larger and shrunk, which smooths lines and letters.
_SCALE = 3
_INK, _FAINT = "#222222", "#e0e0e0"
# Told apart by people who see few colours too. Source: Okabe & Ito, Color universal design, 2008.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442")
_TEXT = 13


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour; `labels` beside the last of them, as many as there are; `line`: joined in order."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = field(default=())
    line: bool = False


class _Sheet:
    """A white sheet whose coordinates are final pixels."""

    def __init__(self, size: tuple[int, int]):
        self.image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        try:
            self.font = ImageFont.load_default(_TEXT * _SCALE)
        except TypeError:  # Pillow 10.0 has one of a fixed size
            self.font = ImageFont.load_default()

    def line(self, points, colour, width=1.0) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.draw.line(scaled, colour, round(width * _SCALE), joint="curve")

    def box(self, x0, y0, x1, y1, colour) -> None:
        if x1 > x0:
            self.draw.rectangle([v * _SCALE for v in (x0, y0, x1, y1)], colour)

    def dot(self, x, y, colour, radius=4.5) -> None:
        self.draw.ellipse([v * _SCALE for v in (x - radius, y - radius, x + radius, y + radius)], colour)

    def width(self, text: str) -> float:
        return self.draw.textlength(text, self.font) / _SCALE

    def text(self, x, y, text: str, anchor="lm", colour=_INK) -> None:
        self.draw.text((x * _SCALE, y * _SCALE), text, colour, self.font, anchor=anchor)

    def upright(self, x, y, text: str) -> None:
        """Text that reads upwards, its middle at (x, y)."""
        size = (int(self.width(text) * _SCALE) + 2, (_TEXT + 6) * _SCALE)
        strip = Image.new("RGB", size, "white")
        ImageDraw.Draw(strip).text((0, size[1] // 2), text, _INK, self.font, anchor="lm")
        strip = strip.rotate(90, expand=True)
        self.image.paste(strip, (round(x * _SCALE - strip.width / 2), round(y * _SCALE - strip.height / 2)))

    def done(self) -> Image.Image:
        size = (self.image.width // _SCALE, self.image.height // _SCALE)
        return self.image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` laid onto pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if math.log10(self.high / self.low) < 3 else (1,)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
            found = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [
            value for value in found if self.low <= value * (1 + 1e-9) and value * (1 - 1e-9) <= self.high
        ]


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (900, 540),
) -> Image.Image:
    """Points and lines over two axes, with a legend where there are several series.

    Args:
        series: what is drawn; values above 0 where an axis is logarithmic.
        title: above the plot.
        x_label, y_label: of the axes, with the unit.
        log_x, log_y: a logarithmic axis; else from 0, unless all values are far from it.
        size: width and height in pixels.
    """
    sheet = _Sheet(size)
    points = [point for one in series for point in one.points]
    plot = (84.0, 44.0, size[0] - 24.0, size[1] - 62.0)
    x_axis = _axis([x for x, _ in points], plot[0], plot[2], log_x)
    y_axis = _axis([y for _, y in points], plot[3], plot[1], log_y)
    sheet.text(plot[0], 22, title)
    for value in x_axis.ticks():
        sheet.line([(x_axis(value), plot[1]), (x_axis(value), plot[3])], _FAINT)
        sheet.text(x_axis(value), plot[3] + 14, number(value), "mm")
    for value in y_axis.ticks():
        sheet.line([(plot[0], y_axis(value)), (plot[2], y_axis(value))], _FAINT)
        sheet.text(plot[0] - 8, y_axis(value), number(value), "rm")
    sheet.line([(plot[0], plot[1]), (plot[0], plot[3]), (plot[2], plot[3])], _INK)
    sheet.text((plot[0] + plot[2]) / 2, size[1] - 20, x_label, "mm")
    sheet.upright(20, (plot[1] + plot[3]) / 2, y_label)
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(series))]
    taken: list[tuple[float, float, float, float]] = []
    for one, colour in zip(series, colours, strict=True):
        placed = [(x_axis(x), y_axis(y)) for x, y in one.points]
        if one.line:
            sheet.line(placed, colour, 2)
            taken += _along(placed)
        for x, y in placed:
            sheet.dot(x, y, colour)
            taken.append((x - 5, y - 5, x + 5, y + 5))
    for one, colour in zip(series, colours, strict=True):
        for (x, y), label in zip(one.points[len(one.points) - len(one.labels) :], one.labels, strict=True):
            _beside(sheet, x_axis(x), y_axis(y), label, colour, taken, plot)
    if len(series) > 1:
        _legend(sheet, dict(zip((one.name for one in series), colours, strict=True)), plot[2], plot[1])
    return sheet.done()


def bars(
    rows: Mapping[str, Mapping[str, float]], *, title: str, x_label: str, width: int = 900
) -> Image.Image:
    """One stacked bar per row, its parts in the order of the first row, its sum at the end.

    Args:
        rows: name -> part -> value, 0 or more.
        title, x_label: above and below; with the unit.
        width: of the picture in pixels.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    colours = {part: _COLOURS[i % len(_COLOURS)] for i, part in enumerate(parts)}
    pitch, top = 30, 74
    sheet = _Sheet((width, top + pitch * len(rows) + 54))
    left = max(sheet.width(name) for name in rows) + 24
    bottom = top + pitch * len(rows)
    axis = _axis([0.0, *(sum(row.values()) for row in rows.values())], left, width - 84, False)
    sheet.text(12, 20, title)
    x = 12.0
    for part, colour in colours.items():
        sheet.box(x, 42, x + 12, 54, colour)
        sheet.text(x + 18, 48, part)
        x += sheet.width(part) + 40
    for value in axis.ticks():
        sheet.line([(axis(value), top), (axis(value), bottom)], _FAINT)
        sheet.text(axis(value), bottom + 13, number(value), "mm")
    for i, (name, row) in enumerate(rows.items()):
        y, end = top + pitch * i, 0.0
        sheet.text(left - 10, y + pitch / 2, name, "rm")
        for part, value in row.items():
            sheet.box(axis(end), y + 5, axis(end + value), y + pitch - 5, colours[part])
            end += value
        sheet.text(axis(end) + 6, y + pitch / 2, number(end))
    sheet.line([(left, top), (left, bottom), (width - 84, bottom)], _INK)
    sheet.text((left + width - 84) / 2, bottom + 36, x_label, "mm")
    return sheet.done()


def number(value: float) -> str:
    """Three digits that count, without an exponent where none is needed."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e6 or digits > 6:
        return f"{value:.2g}"
    text = f"{value:.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _axis(values: Sequence[float], start: float, end: float, log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.3, high * 1.3
    else:
        low = 0.0 if 0 <= low < 0.6 * high else low - 0.1 * (high - low)
        high += 0.08 * (high - low) or 1.0
    return _Axis(low, high, start, end, log)


def _beside(sheet, x, y, label, colour, taken, plot) -> None:
    """Write a point's label where it covers nothing: right, left, above or below; else on the right all the same."""
    width, half = sheet.width(label), _TEXT / 2 + 1
    places = [
        (x + 9, y),
        (x - 9 - width, y),
        *(
            (left, y + way * lines)
            for lines in (15, 29, 43)
            for way in (-1, 1)
            for left in (x + 6, x - 6 - width)
        ),
    ]
    for left, middle in places:
        box = (left, middle - half, left + width, middle + half)
        inside = plot[0] < box[0] and box[2] < plot[2] and plot[1] < box[1] and box[3] < plot[3]
        if inside and not any(_meet(box, other) for other in taken):
            break
    else:
        left, middle = places[0]
        box = (left, middle - half, left + width, middle + half)
    taken.append(box)
    sheet.text(left, middle, label, colour=colour)


def _along(points: Sequence[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    """Small boxes along a line, for labels to keep clear of."""
    boxes = []
    for (x0, y0), (x1, y1) in pairwise(points):
        steps = max(1, round(math.hypot(x1 - x0, y1 - y0) / 6))
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            boxes.append((x - 2, y - 2, x + 2, y + 2))
    return boxes


def _meet(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _legend(sheet, colours: Mapping[str, str], right: float, top: float) -> None:
    """Above the plot, from the right."""
    x = right - sum(sheet.width(name) + 34 for name in colours)
    for name, colour in colours.items():
        sheet.dot(x + 6, top - 22, colour)
        sheet.text(x + 16, top - 22, name)
        x += sheet.width(name) + 34
