"""What `bench` found as tables and CSV."""

import csv
import io
import math
from collections.abc import Mapping

from .comparison_of_runs import Comparison
from .rows import Benchmark

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
        memory = row.cold or {}
        if cold:
            numbers += [memory.get("first_images"), memory.get("peak")]
        if on_gpu:
            numbers.append(memory.get("device_memory"))
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
    lines += _left_out_lines(benchmark)
    return "\n".join(lines)


def csv_text(benchmark: Benchmark) -> str:
    """One line per row, with a header."""
    stages = _stages(benchmark)
    cold = sorted({name for row in benchmark.rows for name in row.cold or {}})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, *stages, *(f"cold_{name}" for name in cold)])
    for row in benchmark.rows:
        values = row.as_json()
        cells = [values[name] for name in _COLUMNS]
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
            format_number(change.old),
            format_number(change.new),
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
    source = (
        "as their fresh processes show"
        if comparison.measured
        else "an assumption; --cold-starts 3 measures it"
    )
    lines.append(
        f"two processes with the same work differ by up to {100 * comparison.process_noise:.1f} %, {source}"
    )
    lines += [f"only in the old run: {key}" for key in comparison.only_old]
    lines += [f"only in the new run: {key}" for key in comparison.only_new]
    return "\n".join(lines)


def _left_out_lines(benchmark: Benchmark) -> list[str]:
    """What could not be measured, one line for each reason."""
    alike: dict[str, list[Mapping[str, str]]] = {}
    for one in benchmark.left_out:
        alike.setdefault(one["why"], []).append(one)
    lines = []
    for why, those in alike.items():
        kinds = ("model", "engine", "precision")
        models, engines, precisions = (", ".join(dict.fromkeys(one[kind] for one in those)) for kind in kinds)
        lines.append(f"left out: {models} in {engines}, {precisions}: {why}")
    return lines


def _stages(benchmark: Benchmark) -> list[str]:
    return list(dict.fromkeys(stage for row in benchmark.rows for stage in row.split))


def _cell(value: float | None) -> str:
    return "" if value is None else format_number(value)


def format_number(value: float) -> str:
    """Return three digits that count, without an exponent where none is needed."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e6 or digits > 6:
        return f"{value:.2g}"
    text = f"{value:.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
