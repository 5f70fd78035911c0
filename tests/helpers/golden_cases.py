"""The recorded numbers of the authors' implementation, by topic and case. See golden/README.md."""

import json
from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def index():
    return json.loads((GOLDEN / "cases.json").read_text())


@cache
def _archive(topic):
    with np.load(GOLDEN / f"{topic}.npz") as archive:
        return {name: archive[name] for name in archive.files}


class Case:
    """One recorded case: `case["array"]`, `case.params`, and how exactly float32 can agree."""

    def __init__(self, topic, name):
        self.topic, self.name = topic, name
        self.params = index()[topic][name]["params"]
        self._spread = index()[topic][name]["f32_vs_f64"]

    def __getitem__(self, array):
        return _archive(self.topic)[f"{self.name}/{array}"]

    def __contains__(self, array):
        return f"{self.name}/{array}" in _archive(self.topic)

    def source(self, array, dtype):
        """An input or derived quantity in `dtype`: float64 takes the float64 recomputation where there is one."""
        wide = array + "_f64"
        return self[wide if dtype == np.float64 and wide in self else array].astype(dtype)

    def check(self, array, value, dtype, where=...):
        """Hold `value` to the recorded float64 answer: 1e-10 in float64, 1e-5 in float32, of the largest value.

        Where the authors' own float32 run is further from float64 than that, 4 times its error.
        """
        expected = self[array + "_f64"]
        scale = self._spread[array]["max_abs_value"]
        atol = 1e-10 * scale
        if dtype == np.float32:
            atol = max(1e-5 * scale, 4 * self._spread[array]["max_abs_err"])
        np.testing.assert_allclose(
            np.asarray(value, np.float64)[where],
            expected[where],
            rtol=0,
            atol=atol,
            err_msg=f"{self.name}/{array}",
        )


def cases(topic, keep=lambda name: True):
    return [Case(topic, name) for name in index()[topic] if keep(name)]


def case_id(value):
    return value.name if isinstance(value, Case) else None
