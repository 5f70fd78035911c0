"""Pictures of figures: points lie where their values are, and nothing falls off the sheet."""

import numpy as np
import pytest

from piflow_edge.bench.plots import Series, draw_bars, draw_chart
from piflow_edge.bench.tables import format_number

pytest.importorskip("matplotlib", reason="pictures are drawn with the 'plots' extra")

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


def places(image, colour):
    """Rows and columns of all pixels of one colour."""
    return np.nonzero((np.asarray(image) == colour).all(-1))


def blueness(image):
    """How much blue ink there is."""
    red, _, blue = np.moveaxis(np.asarray(image, float), -1, 0)
    return float(np.maximum(blue - red, 0).sum())


@pytest.mark.parametrize("log", [False, True])
def test_a_larger_value_is_further_right_and_higher_up(log):
    series = [Series("a", [(1, 1)]), Series("b", [(100, 100)])]
    image = draw_chart(series, title="t", x_label="x", y_label="y", log_x=log, log_y=log)
    assert image.size == (900, 540)
    (rows, columns), (other_rows, other_columns) = (places(image, colour) for colour in (BLUE, ORANGE))
    below_legend = rows > 60, other_rows > 60
    assert columns[below_legend[0]].mean() < other_columns[below_legend[1]].mean() - 300
    assert rows[below_legend[0]].mean() > other_rows[below_legend[1]].mean() + 200


def test_labels_do_not_cover_each_other():
    points = [(1.0, 1.0), (1.001, 1.0)]
    empty = draw_chart([Series("a", points)], title="", x_label="", y_label="")
    far = draw_chart([Series("a", points, ["left", "right"])], title="", x_label="", y_label="")
    alone = [
        draw_chart([Series("a", points, [text, ""])], title="", x_label="", y_label="")
        for text in ("left", "right")
    ]
    pictures = (far, *alone, empty)
    both, left, right, none = (blueness(p) for p in pictures)
    assert both - none == pytest.approx(left + right - 2 * none, rel=0.1)


def test_bars_are_as_long_as_their_parts():
    image = draw_bars({"one": {"a": 1.0, "b": 2.0}, "two": {"a": 2.0, "b": 0.0}}, title="t", x_label="ms")
    lengths = {}
    for colour in (BLUE, ORANGE):
        rows, _ = places(image, colour)
        found = np.bincount(rows, minlength=image.height)
        lengths[colour] = [found[top : top + 60].max() for top in (20, 80)] if colour == BLUE else found.max()
    one, two = sorted(length for length in lengths[BLUE])
    assert two == pytest.approx(2 * one, rel=0.05)
    assert lengths[ORANGE] == pytest.approx(2 * one, rel=0.05)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1234"),
        (0.123456, "0.123"),
        (12.0, "12"),
        (1e9, "1e+09"),
        (1e-9, "1e-09"),
        (99.96, "100"),
    ],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text
