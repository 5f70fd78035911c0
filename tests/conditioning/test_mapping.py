"""The plain functions on conditioning, with NumPy and with torch."""

import numpy as np
import pytest

from piflow_edge.conditioning import concatenate, count_of, take
from piflow_edge.errors import ShapeError


def as_numpy(values):
    return np.array(values)


def as_torch(values):
    return pytest.importorskip("torch").tensor(values)


@pytest.mark.parametrize("array", [as_numpy, as_torch])
def test_taking_and_joining_keep_the_images_in_order(array):
    conditioning = {"labels": array([3, 1, 4, 1]), "hidden": array([[0.0], [1.0], [2.0], [3.0]])}
    assert count_of(conditioning) == 4
    first, last = take(conditioning, slice(0, 1)), take(conditioning, array([3, 2]))
    joined = concatenate([first, last])
    assert type(joined["labels"]) is type(conditioning["labels"])
    assert joined["labels"].tolist() == [3, 1, 4]
    assert joined["hidden"].tolist() == [[0.0], [3.0], [2.0]]


def test_an_empty_conditioning_does_not_know_its_count():
    assert count_of({}) is None
    assert count_of({}, 4) == 4
    assert take({}, slice(0, 1)) == {} == concatenate([{}, {}])


def test_inputs_of_different_batches_are_refused():
    with pytest.raises(ShapeError, match="'a' 2, 'b' 3"):
        count_of({"a": np.zeros(2), "b": np.zeros(3)})


def test_joining_different_lengths_is_refused():
    with pytest.raises(ShapeError, match=r"\(1, 2\) and \(1, 3\)"):
        concatenate([{"a": np.zeros((1, 2))}, {"a": np.zeros((1, 3))}])
