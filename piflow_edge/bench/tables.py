"""What `bench` found as tables, CSV and pictures."""

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from piflow_edge.bundle.folder import Bundle
from piflow_edge.errors import DataError
from piflow_edge.system.plots import Series, bars, chart, number

from .comparison_of_runs import Comparison
from .rows import Benchmark, Row

Quality = Mapping[tuple[str, int], float]  # FID by contender's name and network calls
# What evaluate adds to a contender's name; a bundle's own may hold commas.
_COUNTED = re.compile(r", \d+ (calls?|steps?)$")

_COLUMNS = ("key", "model", "engine", "device", "precision", "calls", "substeps", "batch", "trained", "median", "p90",
            "p99", "images_per_second")  # fmt: skip


def text_table(benchmark: Benchmark):
    """The rows as a rich table; times in ms, memory in MB."""
    from rich.box import SIMPLE
    from rich.table import Table

    stages = _stages(benchmark)
    table = Table(
        box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), caption="ms for a batch, MB of the process"
    )
    for name in ("", "engine", "precision"):
        table.add_column(name, overflow="fold")
    heads = ["calls", "substeps", "batch", "median", "p90", "p99", "images/s", *stages]
    cold = any(row.cold for row in benchmark.rows)
    on_gpu = any(row.cold and row.cold["device_memory"] is not None for row in benchmark.rows)
    heads += ["first images", "peak MB"] if cold else []
    heads += ["GPU MB"] if on_gpu else []
    for name in heads:
        table.add_column(name, justify="right", no_wrap=name not in ("first images", "images/s"))
    for row in benchmark.rows:
        setting = row.setting
        name = setting.model if row.trained else f"{setting.model} (not trained for {setting.calls})"
        numbers = [row.median, row.p90, row.p99, row.images_per_second, *(row.split.get(s) for s in stages)]
        if cold:
            numbers += [row.cold["first_images"], row.cold["peak"]]
        if on_gpu:
            numbers.append(row.cold["device_memory"])
        counts = (setting.calls, "" if setting.substeps is None else setting.substeps, setting.batch)
        table.add_row(name, setting.engine, setting.precision, *map(str, counts), *map(_cell, numbers))
    return table


def conditions_text(benchmark: Benchmark) -> str:
    """What the figures were measured on and how, and what could not be: for people, in a few lines."""
    conditions = benchmark.conditions
    power = {k: v for k, v in conditions["before"]["power"].items() if v is not None}
    lines = [
        f"{conditions['cpu']}, {conditions['cores']} cores; {conditions['system']}; "
        + ", ".join(f"{name} {version}" for name, version in conditions["versions"].items()),
        f"clocks and power: {power or 'this machine does not tell'}",
        f"{conditions['rounds']} rounds after {conditions['warmup']} to warm up; {conditions['timed']}",
        f"load when it began {conditions['before']['load']}, when it ended {conditions['after']['load']}",
    ]
    if conditions["cold_starts"]:
        lines.append(f"first images and memory: medians of {conditions['cold_starts']} fresh processes")
    if conditions["teacher"]:
        teacher = conditions["teacher"]
        samples = 2 if teacher["guidance_scale"] > 1 else 1
        lines.append(
            f"a teacher's call: {samples} sample{'s' * (samples > 1)} per image, in one run of the network"
        )
    lines += [
        f"left out: {one['model']} in {one['engine']}, {one['precision']}: {one['why']}"
        for one in benchmark.left_out
    ]
    return "\n".join(lines)


def csv_text(benchmark: Benchmark) -> str:
    """One line per row, with a header."""
    stages = _stages(benchmark)
    cold = sorted({name for row in benchmark.rows for name in row.cold or {}})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, *stages, *(f"cold_{name}" for name in cold)])
    for row in benchmark.rows:
        told = row.as_json()
        cells = [told[name] for name in _COLUMNS]
        cells += [row.split.get(stage) for stage in stages]
        writer.writerow(cells + [(row.cold or {}).get(name) for name in cold])
    return file.getvalue()


def comparison_table(comparison: Comparison):
    """What moved, as a rich table."""
    from rich.table import Table

    table = Table("", title="ms, old beside new")
    for name in ("old", "new", "new / old", "99 % interval", ""):
        table.add_column(name, justify="right")
    for change in (*comparison.changes, comparison.machine):
        interval = f"{change.low:.3f} to {change.high:.3f}"
        table.add_row(
            change.key,
            number(change.old),
            number(change.new),
            f"{change.ratio:.3f}",
            interval,
            change.verdict,
        )
    return table


def comparison_text(comparison: Comparison) -> str:
    """What was not alike, in a few lines; empty where everything was."""
    lines = [f"not alike: {name}: was {old!r}, is {new!r}" for name, old, new in comparison.differs]
    if comparison.machine.verdict != "within noise":
        lines.append(
            f"the machine itself is {comparison.machine.verdict}: a fixed piece of NumPy takes "
            f"{comparison.machine.ratio:.2f} times as long as it did"
        )
    told = (
        "as their fresh processes show"
        if comparison.measured
        else "an assumption; --cold-starts 3 measures it"
    )
    lines.append(
        f"two processes with the same work differ by up to {100 * comparison.process_noise:.1f} %, {told}"
    )
    lines += [f"only in the old run: {key}" for key in comparison.only_old]
    lines += [f"only in the new run: {key}" for key in comparison.only_new]
    return "\n".join(lines)


def read_quality(file: Path) -> Quality:
    """FID by contender's name and network calls, from the evaluation.json of `piflow-edge evaluate`.

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
    """Hold an evaluation to what is going to be measured: it must score one of the bundles, as `picture` asks.

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


def picture(benchmark: Benchmark, quality: Quality | None):
    """Time per image against FID; without `quality`, where the time of every row goes. A PIL image.

    Raises:
        DataError: no row has a quality.
    """
    if quality is None:
        rows = {row.setting.key: _shares(row) for row in benchmark.rows}
        return bars(rows, title="where the time of a batch goes", x_label="ms", width=1200)
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
    return chart(
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


def _shares(row: Row) -> dict[str, float]:
    return {stage: max(0.0, value) for stage, value in row.split.items()}


def _stages(benchmark: Benchmark) -> list[str]:
    return list(dict.fromkeys(stage for row in benchmark.rows for stage in row.split))


def _cell(value: float | None) -> str:
    return "" if value is None else number(value)
