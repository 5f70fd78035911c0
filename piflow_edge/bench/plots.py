"""Points over two axes and stacked bars, drawn by matplotlib (extra `plots`) as PIL images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from piflow_edge.errors import MissingExtraError

from .tables import format_number

# Told apart by people who see few colours too. Source: Okabe & Ito, Color universal design, 2008.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#f0e442")
_DPI = 100
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "font.size": 10,
    "grid.color": "#e0e0e0",
    "legend.frameon": False,
}
# Where a point's label is tried, in points from it: where it begins, or ends if that is to the left.
_PLACES = ((6, 5), (-6, 5), (6, -13), (-6, -13), (6, 18), (-6, 18), (6, -26), (-6, -26))


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour; `labels` beside the last of them, as many as there are; `line`: joined in order."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = field(default=())
    line: bool = False


def draw_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (900, 540),
) -> Image.Image:
    """Draw points and lines over two axes, with a legend where there are several series.

    Args:
        series: what is drawn; values above 0 where an axis is logarithmic.
        title: above the plot.
        x_label, y_label: of the axes, with the unit.
        log_x, log_y: a logarithmic axis.
        size: width and height in pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with _open_axes(size) as (figure, axes):
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.set_xscale("log" if log_x else "linear")
        axes.set_yscale("log" if log_y else "linear")
        axes.margins(0.1)
        for one, colour in zip(series, _colours(len(series)), strict=True):
            x, y = zip(*one.points, strict=True)
            axes.plot(x, y, "o-" if one.line else "o", color=colour, label=one.name)
        for along, logarithmic in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
            _write_ticks(along, logarithmic)
        if len(series) > 1:
            figure.legend(loc="outside upper right", ncols=len(series))
        _write_labels(figure, axes, series)
        return _render(figure)


def draw_bars(
    rows: Mapping[str, Mapping[str, float]], *, title: str, x_label: str, width: int = 900
) -> Image.Image:
    """Draw one stacked bar per row, its parts in the order of the first row, its sum at the end.

    Args:
        rows: name -> part -> value, 0 or more.
        title, x_label: above and below; with the unit.
        width: of the picture in pixels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with _open_axes((width, 130 + 30 * len(rows))) as (figure, axes):
        axes.set(title=title, xlabel=x_label)
        axes.grid(visible=False, axis="y")
        ends = np.zeros(len(rows))
        for part, colour in zip(parts, _colours(len(parts)), strict=True):
            values = np.array([row.get(part, 0.0) for row in rows.values()])
            axes.barh(range(len(rows)), values, left=ends, color=colour, label=part, height=0.7)
            ends += values
        for place, end in enumerate(ends):
            axes.annotate(
                format_number(end), (end, place), (5, 0), textcoords="offset points", va="center_baseline"
            )
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        if len(parts) > 1:
            figure.legend(loc="outside upper right", ncols=len(parts))
        return _render(figure)


def require_matplotlib() -> None:
    """Raise MissingExtraError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401  (an import is what tells)
    except ImportError as error:
        raise MissingExtraError(
            "plots need 'matplotlib'; get it with: pip install 'piflow-edge[plots]'"
        ) from error


@contextmanager
def _open_axes(size: tuple[int, int]) -> Iterator[tuple]:
    """Give a figure of so many pixels and its axes, without pyplot, which keeps figures and wants a screen."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.add_subplot()


def _write_ticks(along, logarithmic: bool) -> None:
    """Write plain numbers at ticks, and at 2 and 5 too where an axis spans a few powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: format_number(value))
    if logarithmic:
        low, high = along.get_view_interval()
        along.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        along.set_minor_formatter(NullFormatter())
    along.set_major_formatter(plain)


def _write_labels(figure, axes, series: Sequence[Series]) -> None:
    """Write each point's label where it covers no other label and no point: right of it, left, above or below."""
    figure.draw_without_rendering()  # so that places in pixels are known
    dots = [axes.transData.transform(point) for one in series for point in one.points]
    written: list = []
    for one, colour in zip(series, _colours(len(series)), strict=True):
        for point, label in zip(one.points[len(one.points) - len(one.labels) :], one.labels, strict=True):
            text = axes.annotate(label, point, color=colour, textcoords="offset points", xytext=_PLACES[0])
            for place in _PLACES:
                text.set_position(place)
                text.set_horizontalalignment("left" if place[0] > 0 else "right")
                box = text.get_window_extent()
                if not any(box.overlaps(other) for other in written) and not any(
                    box.contains(*dot) for dot in dots
                ):
                    break
            written.append(box)


def _colours(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _render(figure) -> Image.Image:
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
