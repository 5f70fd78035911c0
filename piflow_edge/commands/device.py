"""Commands about this machine: `bench`, `doctor`."""

import math
from pathlib import Path

import click

from .options import (
    BUNDLE_PATH,
    JSON,
    calls,
    emit,
    engine_options,
    engine_settings,
    placement_options,
    say,
    show,
)

FILE = click.Path(dir_okay=False, path_type=Path)


def names(context, parameter, text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def finite(context, parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):  # the ranges of click let NaN through
        raise click.BadParameter(f"give a number; got {value}")
    return value


def writable(context, parameter, file: Path | None) -> Path | None:
    if file is not None and not file.parent.is_dir():  # better known before minutes of measuring
        raise click.BadParameter(f"there is no folder {file.parent} to write {file.name} in; make it first")
    return file


def counts(context, parameter, text: str | None) -> list[int] | None:
    return calls(context, parameter, text) or None


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


@click.command()
@click.argument("bundles", nargs=-1, required=True, **BUNDLE_PATH)
@click.option("--engine", "engines", default="auto", callback=names, metavar="NAME,...",
              help="Backends; all is every one that runs here.")  # fmt: skip
@click.option(
    "--precision", "precisions", callback=names, metavar="NAME,...", help="Else all of each bundle."
)
@click.option(
    "--nfe", "nfes", callback=counts, metavar="N,...", help="Network calls per image; else as trained."
)
@click.option(
    "--substeps", callback=counts, metavar="N,...", help="Of the policy, in all; else the bundle's."
)
@click.option("--batch", "batches", default="1", callback=counts, metavar="N,...", help="Images at a time.")
@click.option("--rounds", type=click.IntRange(min=1), default=100, help="Timed calls of each contender.")
@click.option("--warmup", type=click.IntRange(min=0), default=5, help="Rounds before that.")
@click.option("--seconds", type=click.FloatRange(min=0), callback=finite, default=120.0,
              help="End the rounds after this time, but not before five.")  # fmt: skip
@click.option("--cold-starts", type=click.IntRange(min=0), default=3,
              help="Fresh processes for first images and memory of each contender.")  # fmt: skip
@placement_options
@click.option("--teacher", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Its graph, by export --teacher-graph: the baseline.")  # fmt: skip
@click.option("--teacher-steps", type=click.IntRange(min=1), default=50, help="Euler steps of the teacher.")
@click.option("--guidance", type=click.FloatRange(min=1), callback=finite,
              help="Of the teacher; else the first bundle's.")  # fmt: skip
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
    context, bundles, engines, precisions, nfes, substeps, batches, rounds, warmup, seconds, cold_starts, teacher,
    teacher_steps, guidance, csv_file, plot, evaluation, old, as_json, **placement,
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
    from piflow_edge.bench import quality_plot
    from piflow_edge.bench.benchmark import bench as measure
    from piflow_edge.bench.comparison_of_runs import compare, read_benchmark
    from piflow_edge.bench.config import BenchConfig, TeacherConfig

    check_outputs(plot, csv_file, evaluation)
    steps_given = context.get_parameter_source("teacher_steps") != click.core.ParameterSource.DEFAULT
    if teacher is None and (steps_given or guidance is not None):
        raise click.UsageError("--teacher-steps and --guidance are of a --teacher; give its graph too")
    # What cannot be read is better known before minutes of measuring.
    settings = engine_settings(engine=None, **placement)
    before = None if old is None else read_benchmark(old)
    quality = None if evaluation is None else quality_plot.read_quality(evaluation)
    if quality is not None:
        quality_plot.check_quality(quality, bundles, nfes, precisions, substeps)
    found = measure(
        bundles,
        BenchConfig(
            engines=engines,
            precisions=precisions,
            nfes=nfes,
            substeps=substeps,
            batches=batches,
            rounds=rounds,
            warmup=warmup,
            seconds=seconds,
            cold_starts=cold_starts,
            device=settings["device"],
            options=settings["options"],
        ),
        None if teacher is None else TeacherConfig(teacher, teacher_steps, guidance),
    )
    show_benchmark(found, None if before is None else compare(before, found.as_json()), as_json)
    # Last, so that a disk that is full by now takes nothing of what was measured.
    write_benchmark(found, quality, csv_file, plot)


@click.command()
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
