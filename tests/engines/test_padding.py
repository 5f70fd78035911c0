"""Calls of fewer samples than an engine takes."""

import numpy as np
import pytest

from piflow_edge.engines.padding import run_padded

AXES = {"x_t": 0, "class_labels": 0}


def double(inputs):
    assert len(inputs["x_t"]) == len(inputs["class_labels"]) >= 4
    return {"u": 2 * inputs["x_t"] + inputs["class_labels"][:, None]}


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_results_are_those_of_the_samples_given(count):
    inputs = {"x_t": np.arange(2.0 * count).reshape(count, 2), "class_labels": np.arange(count)}
    found = run_padded(double, inputs, AXES, 4)["u"]
    np.testing.assert_array_equal(found, 2 * inputs["x_t"] + np.arange(count)[:, None])


@pytest.mark.parametrize("inputs", [{"x_t": np.zeros((1, 2))}, {}, {"x_t": np.zeros((0, 2))}])
def test_what_is_wrong_is_left_to_the_engine(inputs):
    seen = []
    run_padded(lambda given: seen.append(given) or {}, inputs, AXES, 4)
    assert seen == [inputs] and seen[0] is inputs
