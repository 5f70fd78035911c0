"""What the figures of a run say: curves as a picture, and whether to train on."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Names of figures in log.jsonl, and what they are called beside the curves.
_CURVES = {"loss": "loss", "error_to_teacher": "mean squared error to the teacher's images"}


def describe_trend(errors: Mapping[int, float]) -> str:
    """Return what the errors to the teacher, by iteration, say about training on; "" for less than four of them."""
    if len(errors) < 4:
        return ""
    iterations = np.array(sorted(errors))
    values = np.array([errors[i] for i in iterations.tolist()])
    late = iterations >= iterations[-1] * 0.75
    late[-2:] = True
    first, last = values[late][0], values[late][-1]
    if not np.isfinite(values[late]).all() or first <= 0:
        return ""
    fall = 1 - last / first
    advice = "more iterations still help" if fall > 0.05 else "more iterations would hardly help"
    return f"error to the teacher over the last quarter: {first:.4g} to {last:.4g} ({-fall:+.0%}); {advice}"


def read_curves(log: Path) -> dict[str, dict[int, float]]:
    """Return the figures of `log.jsonl` that curves are drawn of: by name, by iteration, without those not finite."""
    curves: dict[str, dict[int, float]] = {name: {} for name in _CURVES}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        for name, curve in curves.items():
            value = entry.get(name)
            if value is not None and math.isfinite(value):
                curve[entry["iteration"]] = value
    return {name: curve for name, curve in curves.items() if curve}


def draw_curves(log: Path, file: Path) -> bool:
    """Draw the curves of `log.jsonl` as PNG; return False where there are none, or no matplotlib (extra `plots`)."""
    curves = {name: curve for name, curve in read_curves(log).items() if len(curve) > 1}
    if not curves:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 2.6 * len(curves)), layout="constrained")
    for axes, (name, curve) in zip(
        np.atleast_1d(figure.subplots(len(curves), 1)), curves.items(), strict=True
    ):
        axes.plot(list(curve), list(curve.values()))
        axes.set_yscale("log")
        axes.set_title(_CURVES[name], fontsize="medium")
        axes.grid(alpha=0.3)
        axes.set_xlabel("iterations")
    figure.savefig(file, format="png")
    return True
