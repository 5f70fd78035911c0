"""Commands about bundles: `export`, `verify`, `inspect`."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from .options import (
    BUNDLE,
    FOLDER,
    JSON,
    RUNTIME_OF_BROWSERS,
    TRUSTED_KEYS,
    axis_ranges,
    calls,
    command,
    emit,
    engine_options,
    engine_settings,
    network_precisions,
    precisions,
    report_rows,
    show,
    temperature,
    user_loras,
)
from .options import size as image_size


@command()
@click.argument("source", metavar="[STUDENT]", required=False)
@click.option("--pipeline", metavar="FOLDER|HUB_ID",
              help="Pipeline of diffusers that --adapter is for; its encoders and decoder come along.")  # fmt: skip
@click.option("--adapter", metavar="FOLDER|HUB_ID[:SUBFOLDER]",
              help="Adapter of pi-Flow's authors, such as Lakonik/pi-FLUX.1:gmflux_k8_piid_4step.")  # fmt: skip
@click.option("--adapter-strength", type=float, default=1.0, help="Of the adapter's LoRA.")
@click.option("--lora", "loras", callback=user_loras, multiple=True, metavar="SOURCE[=STRENGTH]",
              help="LoRA of your own for the --pipeline's transformer, in diffusers' format, added to its weights. Can "
              "be given again.")  # fmt: skip
@click.option("--size", callback=image_size, metavar="SIDE|HEIGHTxWIDTH",
              help="Of the images of a --pipeline, in pixels; else 1024x1024.")  # fmt: skip
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path),
              help="JSON that says what the weights of a state dict are of.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="Folder of the bundle, for triton of the model repository, for web of the page.")  # fmt: skip
@click.option("--target", type=click.Choice(["bundle", "triton", "web"]), default="bundle",
              help="triton: the sampler graphs as models for NVIDIA Triton; web: a page that draws in the browser. "
              "Both are checked as a bundle first.")  # fmt: skip
@click.option("--name", help="Name of the bundle; else the folder's.")
@click.option("--temperature", callback=temperature, default="auto", metavar="NUMBER|auto",
              help="Of GM policies at every call but the last, recorded as the default: 0 or more, or auto, the "
                   "published rule min(0.1 (NFE - 1), 1); 1 leaves them as trained.")  # fmt: skip
@click.option("--sampler-graph", "samplers", callback=calls, metavar="NFE,...",
              help="Also write the whole sampler as one graph, for each of these calls per image: 1,2,4.")  # fmt: skip
@click.option("--precision", "precisions", callback=precisions, default="fp32", metavar="NAME,...",
              help="Of the graphs: fp32, fp16, int8, int8-qdq, int8-weights, int4, int4-64, int4-128; the first is the "
              "bundle's default.")  # fmt: skip
@click.option("--network-precision", "network_precisions", callback=network_precisions, multiple=True,
              metavar="NETWORK=NAME",
              help="One precision for some networks, whatever --precision says, such as encoder=int8, decoder=fp32 or "
              "encoder.t5=int4; can be given again.")  # fmt: skip
@click.option("--axis", "axes", callback=axis_ranges, multiple=True, metavar="NAME=MIN:MAX[:MULTIPLE]",
              help="How long a named axis of what steers may be, such as tokens=1:512; else any length.")  # fmt: skip
@click.option("--opset", type=click.Choice(["17", "18"]), default="18",
              help="Of the graphs; the parsers of TensorRT 8.5 and 8.6 promise 17.")  # fmt: skip
@click.option("--autoencoder", type=FOLDER,
              help="Folder of the autoencoder the latents are of; its decoder goes into the bundle.")  # fmt: skip
@click.option("--text-encoder", "encoders", multiple=True, metavar="SOURCE",
              help="Folder or hub id of a text encoder of transformers; it goes into the bundle, which then reads "
              "prompts. Can be given again.")  # fmt: skip
@click.option("--license", "license_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file that becomes the bundle's LICENSE.")  # fmt: skip
@click.option("--sign", "key", type=click.Path(dir_okay=False, path_type=Path), metavar="KEY",
              help="Sign the bundle with this Ed25519 private key in PEM.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the bundle at --out.")
@click.option("--teacher-graph", is_flag=True,
              help="STUDENT is a teacher: write its network alone, as the file --out, for bench.")  # fmt: skip
@JSON
def export(
    source,
    pipeline,
    adapter,
    adapter_strength,
    loras,
    size,
    config,
    out,
    target,
    name,
    temperature,
    samplers,
    precisions,
    network_precisions,
    axes,
    opset,
    autoencoder,
    encoders,
    license_file,
    key,
    overwrite,
    teacher_graph,
    as_json,
):
    """Write a student as a bundle that runs without PyTorch, checked against PyTorch.

    STUDENT is a checkpoint of distill, a state dict (.pt, .pth, .safetensors) with --config,
    package.module:function, which returns a StudentModel, or a class-conditional student of
    pi-Flow's authors by folder, file or hub id. Their adapters are exported with the pipeline they
    are for: --pipeline and --adapter in the place of STUDENT.

    \b
    Example:
      piflow-edge export runs/student-1 --out bundles/digits
      piflow-edge export runs/student-1 --target triton --out models
      piflow-edge export runs/student-1 --target web --out site
      piflow-edge export weights.safetensors --config student.json --out bundles/mine
      piflow-edge export runs/teacher --teacher-graph --out teacher.onnx
      piflow-edge export --pipeline FLUX.1-dev --adapter pi-FLUX.1:gmflux_k8_piid_4step --out flux
    """
    _check_source(source, pipeline, adapter)
    if teacher_graph:
        _refuse_options_of_a_student()
        _export_teacher(source, out, overwrite, as_json)
        return
    from piflow_edge.bundle.signature import SigningKey
    from piflow_edge.export.to_bundle import export_bundle

    given_license = _read_license(license_file)
    if pipeline:
        student, parts = _read_pipeline(pipeline, adapter, size, adapter_strength, loras)
    else:
        student, parts = _read_student(source, config, autoencoder, encoders)
    settings = {
        "name": name or out.name,
        "temperature": temperature,
        "samplers": samplers,
        "precisions": precisions,
        "network_precisions": network_precisions,
        "axes": axes,
        "opset": int(opset),
        **parts,
        **given_license,
        "signing_key": SigningKey(key) if key else None,
    }
    if target != "bundle":
        if key or overwrite:
            raise click.UsageError(
                f"--sign and --overwrite are for a bundle; leave them out with --target {target}"
            )
        rows, written = {"triton": _export_to_triton, "web": _export_to_web}[target](student, out, settings)
    else:
        rows, written = export_bundle(student, out, **settings, overwrite=overwrite), [out]
    found = {"models": [str(model) for model in written]} if target == "triton" else {target: str(out)}
    report_rows(rows, as_json, found)
    if not as_json:
        for folder in written:
            click.echo(folder)


def _check_source(source: str | None, pipeline: str | None, adapter: str | None) -> None:
    """Raise UsageError unless there is one student: STUDENT, or a pipeline with its adapter."""
    if (source is None) == (pipeline is None):
        raise click.UsageError("give STUDENT, or --pipeline and --adapter")
    if (pipeline is None) != (adapter is None):
        raise click.UsageError("--pipeline and --adapter are given together")


def _read_license(file: Path | None) -> dict[str, str]:
    """Return what `export_bundle` is told of a license that was given."""
    try:
        return (
            {}
            if file is None
            else {"license_text": file.read_text(encoding="utf-8"), "license_name": file.name}
        )
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--license must be a text file in UTF-8: {error}") from error


def _read_student(
    source: str, config: Path | None, autoencoder: Path | None, encoders: tuple[str, ...]
) -> tuple:
    """The student, and what else its bundle is made of."""
    from piflow_edge.distill.data.autoencoder import load_autoencoder
    from piflow_edge.distill.networks.text_encoders import load_text_encoders
    from piflow_edge.distill.sources import load_student

    student = load_student(source, config=config)
    return student, {
        "autoencoder": load_autoencoder(autoencoder) if autoencoder else None,
        "encoders": load_text_encoders(encoders, student.conditioner) if encoders else (),
    }


def _read_pipeline(pipeline: str, adapter: str, size, strength: float, loras) -> tuple:
    """The student, and what else its bundle is made of: parts of the pipeline, and the base's license."""
    from piflow_edge.distill.official.user_lora import UserLoRA
    from piflow_edge.export.pipelines.pipeline_parts import read_pipeline

    _refuse_options("is part of the --pipeline; leave it out", "config", "autoencoder", "encoders")
    sides = (size, size) if isinstance(size, int) else size
    own = [UserLoRA(*lora) for lora in loras]
    parts = read_pipeline(pipeline, adapter, size=sides, strength=strength, loras=own)
    found: dict[str, Any] = {"autoencoder": parts.autoencoder, "encoders": parts.encoders}
    if parts.license_name:
        found |= {"license_name": parts.license_name, "license_text": parts.license_text}
    return parts.student, found


def _export_to_triton(student, repository: Path, settings: dict) -> tuple[list, list[Path]]:
    """The bundle's rows, and the model of each of its sampler graphs; the bundle itself is not kept."""
    from tempfile import TemporaryDirectory

    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.export.to_bundle import export_bundle
    from piflow_edge.runtime.triton import model_folder, write_model

    calls_per_image = settings["samplers"] or student.nfes[-1:]  # of several it was trained for, the best
    for nfe in calls_per_image:
        model_folder(repository, settings["name"], nfe)  # before the work, not after it
    with TemporaryDirectory() as place:
        folder = Path(place) / "bundle"
        rows = export_bundle(student, folder, **settings | {"samplers": calls_per_image})
        bundle = Bundle(folder)
        return rows, [write_model(bundle, repository, nfe=nfe) for nfe in calls_per_image]


def _export_to_web(student, out: Path, settings: dict) -> tuple[list, list[Path]]:
    """The bundle's rows, and the folder of the page that draws from it."""
    from tempfile import TemporaryDirectory

    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.export.to_bundle import export_bundle
    from piflow_edge.runtime.serve.page_folder import find_runtime, write_folder

    find_runtime(RUNTIME_OF_BROWSERS)  # before the work, not after it; and so with what stands there
    if out.exists():
        raise click.UsageError(f"{out} exists; give another name")
    with TemporaryDirectory() as place:
        folder = Path(place) / "bundle"
        rows = export_bundle(student, folder, **settings)
        return rows, [write_folder([Bundle(folder)], RUNTIME_OF_BROWSERS, out)]


def _refuse_options_of_a_student() -> None:
    names = [option.name for option in click.get_current_context().command.params]
    others = [
        name for name in names if name not in ("source", "out", "overwrite", "teacher_graph", "as_json")
    ]
    _refuse_options("is for a student's bundle; leave it out with --teacher-graph", *others)


def _refuse_options(reason: str, *names: str) -> None:
    """Raise UsageError if an option of these names was given on the command line; `reason` follows its name."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
        if given and option.name in names:
            raise click.UsageError(f"{option.opts[0]} {reason}")


def _export_teacher(checkpoint: str, file: Path, overwrite: bool, as_json: bool) -> None:
    from piflow_edge.distill.sources import load_teacher
    from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher

    if file.exists() and not overwrite:
        raise click.UsageError(f"{file} exists; give another name, or --overwrite")
    if file.suffix.lower() != ".onnx":
        raise click.UsageError(
            f"a teacher's graph is one file; give --out a name that ends in .onnx; got {file}"
        )
    teacher = load_teacher(checkpoint)
    error = export_teacher(teacher.network, file, teacher.conditioner)
    if as_json:
        emit({"file": str(file), "error": error})
    else:
        click.echo(file)


@command()
@BUNDLE
@engine_options
@click.option("--precision", help="Check this one; else all of the bundle's.")
@TRUSTED_KEYS
@JSON
def verify(bundle, precision, trusted_keys, as_json, **engine):
    """Check a bundle's files, and that it reproduces its golden samples here. Exit status 1 if not.

    \b
    Example:
      piflow-edge verify demo/bundles/digits-nfe1
    """
    from piflow_edge.runtime.loading import load
    from piflow_edge.runtime.verification import check, verify

    settings = engine_settings(**engine) | {"trusted_keys": trusted_keys}
    with load(bundle, precision=precision, **settings) as generator:
        rows = verify(generator)
    if precision is None:
        for other in generator.bundle.manifest.precisions[1:]:
            with load(bundle, precision=other, **settings) as loaded:
                rows += verify(loaded)
    signature = generator.bundle.signature
    context = {"bundle": str(bundle), "engine": generator.engine.name}
    report_rows(rows, as_json, {**context, "signature": vars(signature) if signature else None})
    if not as_json:
        click.echo(f"signed by: {signature or 'nobody'}")
    check(rows, generator.bundle.name)


def print_schema(context, parameter, wanted):
    if wanted and not context.resilient_parsing:
        from piflow_edge.bundle.schema import schema_text

        click.echo(schema_text(), nl=False)
        context.exit()


@command()
@BUNDLE
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=print_schema,
              help="Print the JSON Schema of bundle.json instead; needs no BUNDLE.")  # fmt: skip
@JSON
def inspect(bundle, as_json):
    """Show what a bundle holds, after checking all its files, and where each of its precisions runs.

    \b
    Example:
      piflow-edge inspect demo/bundles/digits-nfe1
      piflow-edge inspect --schema
    """
    from dataclasses import asdict

    from piflow_edge.bundle.compatibility import compatibility, gpu_names
    from piflow_edge.bundle.folder import Bundle
    from piflow_edge.runtime.drawing.recorded_memory import estimate_recorded_memory
    from piflow_edge.runtime.residence.memory_needs import estimate_memory

    from .description import describe_manifest, describe_memory, describe_networks, describe_recorded_memory

    opened = Bundle(bundle)
    opened.check_graphs()
    manifest, signature = opened.manifest, opened.signature
    answers = compatibility(opened)
    if as_json:
        signed = vars(signature) if signature else None
        recorded = estimate_recorded_memory(manifest)
        needs = {precision: vars(estimate_memory(opened, precision)) for precision in manifest.precisions}
        emit({**asdict(manifest), "signature": signed, "compatibility": [vars(row) for row in answers],
              "recorded_image_bytes": recorded and recorded._asdict(), "memory_bytes": needs})  # fmt: skip
        return
    described = describe_manifest(manifest) | {
        "memory on a CPU": describe_memory(opened),
        "recorded on a GPU": describe_recorded_memory(manifest),
        "signed by": str(signature or "nobody"),
    }
    rows = [
        (row.precision, row.runtime, ", ".join(row.jetpacks), gpu_names(row.gpus), row.answer, row.reason)
        for row in answers
    ]
    show_rows(f"bundle {manifest.name}", [], described.items())
    show_rows("networks", ["network", "inputs", "outputs", "opset", "files"], describe_networks(manifest))
    heads = ["precision", "runtime", "JetPack", "GPU, compute capability", "loads", "why"]
    show_rows("where it runs, by the makers' documents", heads, rows)


def show_rows(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table of texts; what a bundle says may hold brackets, which rich would read as markup elsewhere."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, title=Text(title), show_header=bool(heads))
    for row in rows:
        table.add_row(*map(Text, row))
    show(table)
