"""The command that makes engines: `build`."""

import click

from .options import BUNDLE, JSON, TRUSTED_KEYS, axis_lengths, command, emit, say, settings_options, show


@command()
@BUNDLE
@settings_options(
    "settings",
    "piflow_edge.engines.building.steps:BuildSettings",
    batch={"metavar": "MIN:OPT:MAX"},
    workspace={"metavar": "MIB"},
)
@settings_options(
    "choice", "piflow_edge.runtime.graphs:GraphChoice", {"lengths": "axis"}, graph={"metavar": "NETWORK"},
    lengths={"type": str, "default": (), "callback": axis_lengths, "multiple": True, "metavar": "NAME=MIN:OPT:MAX"},
)  # fmt: skip
@click.option("--rebuild", is_flag=True, help="Build even what the cache has.")
@click.option("--dry-run", is_flag=True, help="Tell what would be built; needs no GPU and no TensorRT.")
@TRUSTED_KEYS
@JSON
def build(bundle, settings, choice, rebuild, dry_run, trusted_keys, as_json):
    """Build engines of a bundle's networks for this GPU, and keep them in the cache, where `--engine` finds them.

    An engine fits the GPU, the TensorRT and the CUDA it was built with, and no others.

    \b
    Example:
      piflow-edge build bundles/digits --engine tensorrt --precision fp16 --batch 1:1:4
      piflow-edge build bundles/digits --dry-run --json
    """
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.engines.building import steps as building
    from piflow_edge.runtime.graphs import find_targets

    opened = Bundle(bundle, trusted_keys=trusted_keys)
    plans = [building.plan(target, settings) for target in find_targets(opened, choice)]
    if dry_run:
        _tell_plans(plans, as_json, {"bundle": str(bundle), "engine": settings.engine})
        return
    reports = [building.build(plan, settings, rebuild=rebuild, say=say) for plan in plans]
    if as_json:
        engines = [report.as_json() for report in reports]
        emit({"bundle": str(bundle), "engine": settings.engine, "engines": engines})
        return
    from rich.table import Table

    table = Table("graph", "precision", "batch", "", "seconds", "peak memory: GPU, host", "engine, MiB")
    for report in reports:
        facts, key = report.facts, report.plan.key
        assert key is not None, "it was built"
        peaks = ", ".join(_mib(facts[f"peak_{where}_bytes"]) for where in ("device", "host"))
        done = "built" if report.built else "from the cache"
        cells = (report.plan.target.name, key.precision, key.profile, done, f"{facts['seconds']:.1f}", peaks)
        table.add_row(*cells, _mib(report.bytes))
    show(table)
    for report in reports:
        click.echo(report.path)


def _tell_plans(plans, as_json: bool, context: dict) -> None:
    if as_json:
        emit({**context, "plans": [plan.as_json() for plan in plans]})
        return
    from rich.table import Table

    for plan in plans:
        memory, table = (
            plan.memory,
            Table(title=f"{plan.target.name} ({plan.target.file})", show_header=False),
        )
        for name, shapes in plan.profile.items():
            sizes = (" x ".join(map(str, shape)) for shape in shapes)
            table.add_row(
                f"input {name}", "; ".join(map(" ".join, zip(("least", "best", "most"), sizes, strict=True)))
            )
        table.add_row("options", plan.options)
        free = ", ".join(_mib(count) for count in (memory.device_free, memory.host_free))
        needed = ", ".join(_mib(count) for count in (memory.device_needed, memory.host_needed))
        table.add_row("memory needed at least, MiB: GPU, host", needed)
        table.add_row("memory free, MiB: GPU, host", free)
        if plan.key is None:
            table.add_row("not here", str(plan.obstacle))
        else:
            for name, value in vars(plan.key).items():
                table.add_row(name.replace("_", " "), value)
        show(table)


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.1f}"
