"""The picture of a benchmark: time against the quality that `evaluate` found, or where the time goes."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from piflow_edge.bundle.folder import Bundle
from piflow_edge.errors import DataError

from .plots import Series, draw_bars, draw_chart
from .rows import Benchmark, Row

Quality = Mapping[tuple[str, int], float]  # FID by contender's name and network calls
# What evaluate adds to a contender's name; a bundle's own may hold commas.
_COUNTED = re.compile(r", \d+ (calls?|steps?)$")


def read_quality(file: Path) -> Quality:
    """Read FID by contender's name and network calls, from the evaluation.json of `piflow-edge evaluate`.

    Raises:
        DataError: another file.
    """
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
        # A student trained for several numbers of calls stands there as "name, 2 calls", a teacher with its steps.
        return {(_COUNTED.sub("", s["name"]), s["network_calls"]): float(s["fid"]) for s in scores}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not the evaluation.json that piflow-edge evaluate --out writes ({error!r})"
        ) from error


def check_quality(
    quality: Quality,
    bundles: Sequence[Path],
    nfes: Sequence[int] | None,
    precisions: Sequence[str] | None,
    substeps: Sequence[int] | None,
) -> None:
    """Hold an evaluation to what is going to be measured: it must score one of the bundles, as `draw_benchmark` asks.

    Args:
        quality: see `read_quality`.
        bundles: folders.
        nfes, precisions, substeps: of `BenchConfig`.

    Raises:
        DataError: there would be nothing to draw.
    """
    for bundle in map(Bundle, bundles):
        manifest = bundle.manifest
        own = (precisions is None or manifest.precisions[0] in precisions) and (
            substeps is None or manifest.schedule.total_substeps in substeps
        )
        names = (bundle.name, bundle.folder.resolve().name)
        if own and any(name in names and (nfes is None or calls in nfes) for name, calls in quality):
            return
    raise _nothing_scored(quality)


def _nothing_scored(quality: Quality) -> DataError:
    return DataError(
        f"the evaluation scores {', '.join(sorted({name for name, _ in quality}))}, none of which is measured here as "
        "it was evaluated: by its network calls, in the bundle's first precision and with its own substeps"
    )


def draw_benchmark(benchmark: Benchmark, quality: Quality | None) -> Image.Image:
    """Draw time per image against FID; without `quality`, where the time of every row goes.

    Raises:
        DataError: no row has a quality.
    """
    if quality is None:
        rows = {row.setting.key: _split_time(row) for row in benchmark.rows}
        return draw_bars(rows, title="where the time of a batch goes", x_label="ms", width=1200)
    found: dict[str, list[tuple[tuple[float, float], str]]] = {}
    for row in benchmark.rows:
        setting = row.setting
        fid = _quality(benchmark, row, quality)
        if fid is None:
            continue
        student = setting.substeps is not None
        calls = f"{setting.calls} call{'s' * (setting.calls > 1)}"
        name = f"{setting.engine}, {setting.precision}, batch {setting.batch}"
        label = calls if student else f"teacher, {calls}"
        found.setdefault(name if student else f"teacher, batch {setting.batch}", []).append(
            ((row.median / setting.batch, fid), label)
        )
    if not found:
        raise _nothing_scored(quality)
    series = [
        Series(name, [point for point, _ in points], [label for _, label in points], line=len(points) > 1)
        for name, points in ((name, sorted(points)) for name, points in found.items())
    ]
    return draw_chart(
        series,
        title="latency against quality",
        x_label="ms per image",
        y_label="FID (lower is better)",
        log_x=True,
    )


def _quality(benchmark: Benchmark, row: Row, quality) -> float | None:
    """Of what was evaluated: a bundle in its first precision with its own substeps, or the teacher."""
    setting = row.setting
    if setting.substeps is None:
        return quality.get(("teacher", setting.calls))
    bundle = benchmark.conditions["bundles"][setting.model]
    if (setting.precision, setting.substeps) != (bundle["precision"], bundle["substeps"]):
        return None
    names = (setting.model, bundle["folder"])
    return next((quality[name, setting.calls] for name in names if (name, setting.calls) in quality), None)


def _split_time(row: Row) -> dict[str, float]:
    return {stage: max(0.0, value) for stage, value in row.split.items()}
