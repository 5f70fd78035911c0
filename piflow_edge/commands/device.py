"""Commands about this machine: `bench`, `doctor`."""

import math
from pathlib import Path

import click

from .options import (
    BUNDLE_PATH,
    JSON,
    command,
    emit,
    engine_options,
    engine_settings,
    field_option,
    placement_options,
    say,
    settings_options,
    show,
)

_CONFIG = "piflow_edge.bench.config"
FILE = click.Path(dir_okay=False, path_type=Path)


def finite(context, parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):  # the ranges of click let NaN through
        raise click.BadParameter(f"give a number; got {value}")
    return value


def writable(context, parameter, file: Path | None) -> Path | None:
    if file is not None and not file.parent.is_dir():  # better known before minutes of measuring
        raise click.BadParameter(f"there is no folder {file.parent} to write {file.name} in; make it first")
    if file is not None:
        from piflow_edge.system.files import check_place

        check_place(file)
    return file


def check_outputs(plot: Path | None, csv_file: Path | None, evaluation: Path | None) -> None:
    """Refuse files that could not be written after minutes of measuring."""
    from piflow_edge.bench.plots import require_matplotlib

    if plot is None:
        if evaluation is not None:
            raise click.UsageError("--evaluation is for --plot; give that too")
        return
    if plot.suffix.lower() != ".png":
        raise click.UsageError(f"a plot is written as PNG; give --plot a name that ends in .png; got {plot}")
    if plot == csv_file:
        raise click.UsageError(f"--csv and --plot cannot both be {plot}; give them two names")
    require_matplotlib()


def show_benchmark(found, change, as_json: bool) -> None:
    """Print the rows, and what moved since an earlier run if `change` says so."""
    from piflow_edge.bench import tables

    if as_json:
        answer = found.as_json()
        emit(answer if change is None else {**answer, "comparison": change.as_json()})
    else:
        show(tables.text_table(found))
        click.echo(tables.conditions_text(found))
    if change is not None:
        say(tables.comparison_text(change))
        if not as_json:
            show(tables.comparison_table(change))


def write_benchmark(found, quality, csv_file: Path | None, plot: Path | None) -> None:
    """Write the table and the picture that were asked for."""
    from piflow_edge.bench import quality_plot, tables
    from piflow_edge.runtime.pictures import png_bytes
    from piflow_edge.system.files import write_atomic

    if csv_file is not None:
        write_atomic(csv_file, tables.csv_text(found).encode())
    if plot is not None:
        write_atomic(plot, png_bytes(quality_plot.draw_benchmark(found, quality)))


@command()
@click.argument("bundles", nargs=-1, required=True, **BUNDLE_PATH)
@settings_options(
    "config",
    f"{_CONFIG}:BenchConfig",
    {"engines": "engine", "precisions": "precision", "nfes": "nfe", "batches": "batch"},
    engines={"metavar": "NAME,..."},
    precisions={"metavar": "NAME,..."},
    nfes={"metavar": "N,..."},
    substeps={"metavar": "N,..."},
    batches={"metavar": "N,..."},
    seconds={"callback": finite},
)
@placement_options
@click.option("--teacher", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Its graph, by export --teacher-graph: the baseline.")  # fmt: skip
@field_option(f"{_CONFIG}:TeacherConfig", "steps", "teacher_steps")
@field_option(f"{_CONFIG}:TeacherConfig", "guidance_scale", "guidance", callback=finite)
@click.option("--csv", "csv_file", type=FILE, callback=writable, help="Also write a table here.")
@click.option("--plot", type=FILE, callback=writable,
              help="Write a PNG here: latency against quality, or where time goes. Needs matplotlib.")  # fmt: skip
@click.option(
    "--evaluation", type=FILE, help="evaluation.json of evaluate --out, with the quality for --plot."
)
@click.option("--compare", "old", type=FILE, help="JSON of an earlier run: what moved beyond noise.")
@JSON
@click.pass_context
def bench(
    context, bundles, config, teacher, teacher_steps, guidance, csv_file, plot, evaluation, old, as_json, **placement,
):  # fmt: skip
    """How fast is it here? Time and memory per engine, precision, calls, substeps and batch.

    Contenders take turns; cold starts and memory are those of fresh processes.

    \b
    Example:
      piflow-edge bench digits
      piflow-edge bench demo/bundles/digits-nfe1 --batch 1,8 --json > before.json
      piflow-edge bench demo/bundles/digits-nfe1 --batch 1,8 --compare before.json
      piflow-edge bench demo/bundles/* --teacher demo/teacher.onnx --evaluation demo/report/evaluation.json --plot b.png
    """
    from dataclasses import replace

    from piflow_edge.bench import quality_plot
    from piflow_edge.bench.benchmark import bench as measure
    from piflow_edge.bench.comparison_of_runs import compare, read_benchmark
    from piflow_edge.bench.config import TeacherConfig

    check_outputs(plot, csv_file, evaluation)
    steps_given = context.get_parameter_source("teacher_steps") != click.core.ParameterSource.DEFAULT
    if teacher is None and (steps_given or guidance is not None):
        raise click.UsageError("--teacher-steps and --guidance are of a --teacher; give its graph too")
    # What cannot be read is better known before minutes of measuring.
    settings = engine_settings(engine=None, **placement)
    before = None if old is None else read_benchmark(old)
    quality = None if evaluation is None else quality_plot.read_quality(evaluation)
    if quality is not None:
        quality_plot.check_quality(quality, bundles, config.nfes, config.precisions, config.substeps)
    found = measure(
        bundles,
        replace(config, device=settings["device"], options=settings["options"]),
        None if teacher is None else TeacherConfig(teacher, teacher_steps, guidance),
    )
    show_benchmark(found, None if before is None else compare(before, found.as_json()), as_json)
    # Last, so that a disk that is full by now takes nothing of what was measured.
    write_benchmark(found, quality, csv_file, plot)


@command()
@click.option(
    "--bundle", help="That the self-test runs; else digits, which comes with the package.", **BUNDLE_PATH
)
@engine_options
@JSON
def doctor(bundle, as_json, **engine):
    """What this machine has, what is missing, and the command that mends it. Exit status 1 on a problem.

    \b
    Example:
      piflow-edge doctor
      piflow-edge doctor --bundle bundles/mine --engine tensorrt
    """
    from piflow_edge.doctor.findings import PROBLEM
    from piflow_edge.doctor.package_findings import obstacles

    first = findings = obstacles()
    if first:
        say("these come first; doctor looks at the rest when they are mended")
    else:
        from piflow_edge.doctor.examination import diagnose

        findings = diagnose(bundle, **engine_settings(**engine))
    healthy = all(finding.status != PROBLEM for finding in findings)
    rows = [(f.status, f.subject, f.detail, f.fix or "") for f in findings]
    if as_json:
        emit({"healthy": healthy, "findings": [vars(finding) for finding in findings]})
    elif first:  # rich may be among them
        click.echo("\n".join(": ".join(filter(None, row)) for row in rows))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", "found", "to mend it")
        for row in rows:
            # As text: a path or a message may hold brackets, which rich would read as markup.
            table.add_row(*map(Text, row))
        show(table)
    if not healthy:
        raise click.exceptions.Exit(1)
