"""The `piflow-edge` command: parse, call, report. What a command does, a Python caller does with the same names.

Results go to stdout, progress and warnings to stderr. Exit status: 0 done, 1 ran but the check failed, 2 wrong usage,
missing extra or unusable input, 130 stopped with Ctrl-C.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

import click

from .errors import MissingExtraError, PiFlowError

# Packages of the `train` extra, by the name they are imported under.
_TRAIN_PACKAGES = {"torch", "onnx", "onnxscript", "safetensors", "accelerate", "sklearn", "scipy"}

# What a command says of going on when it is stopped with Ctrl-C.
_GOING_ON = {
    "demo": "; the same command goes on where it was",
    "train-teacher": "; the same command with --resume goes on",
    "distill": "; the same command with --resume goes on",
}


def _size(context, parameter, text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise click.BadParameter(f"give a side, such as 64, or height x width, such as 48x64; got {text!r}")
    height, width = match.groups()
    return (int(height), int(width)) if width else int(height)


FOLDER = click.Path(file_okay=False, path_type=Path)
BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
SEED = click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of everything random.")
DATA = click.option(
    "--data",
    default="digits",
    help="'digits', an .npz of images or latents, or a folder with one folder of images per class.",
)
IMAGE_SIZE = click.option(
    "--size",
    callback=_size,
    metavar="N|HxW",
    help="Bring the images of a folder to this height and width: scaled until they cover it, and cut to the middle.",
)
AUTOENCODER = click.option(
    "--autoencoder",
    type=FOLDER,
    help="Folder of an AutoencoderKL or AutoencoderTiny of diffusers: train on its latents of the images.",
)
RESUME = click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
PRECISION = click.option(
    "--mixed-precision",
    type=click.Choice(["no", "bf16", "fp16"]),
    help="Of the networks; else what accelerate launch says, or no.",
)
COUNT = click.IntRange(min=1)
# How a run is carried out: the fields of RunConfig.
RUN = (
    click.option("--gradient-accumulation", type=COUNT, default=1,
                 help="Pieces in which each process takes its share of a batch."),
    click.option("--gradient-checkpointing", is_flag=True,
                 help="Compute activations again in the backward pass: less memory, more time."),
    click.option("--max-skipped-in-a-row", type=COUNT, default=10,
                 help="Steps that are not finite after which to stop."),
    click.option("--save-every", type=COUNT, default=500, help="Steps between checkpoints."),
    click.option("--log-every", type=COUNT, default=50, help="Steps between lines of log.jsonl."),
    click.option("--sample-every", type=click.IntRange(min=0), default=0,
                 help="Steps between sheets of samples, in samples/; 0 is none."),
    click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard, in tensorboard/."),
)  # fmt: skip


def run_options(command):
    """The options of `RUN`, which the command gets as `**run`."""
    for option in reversed(RUN):
        command = option(command)
    return command


class Group(click.Group):
    """The one place where errors become messages and exit codes."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except PiFlowError as error:
            click.echo(f"piflow-edge: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"piflow-edge: stopped{_GOING_ON.get(context.invoked_subcommand, '')}", err=True)
            context.exit(130)
        except BrokenPipeError:
            raise  # whoever read our output has seen enough; click knows what to do
        except OSError as error:  # a full disk, a path that cannot be written
            where = f": {error.filename}" if error.filename else ""
            click.echo(f"piflow-edge: {error.strerror or error}{where}", err=True)
            context.exit(2)
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in _TRAIN_PACKAGES:
                raise
            missing = MissingExtraError(
                f"this command needs {error.name!r}; get it with: pip install 'piflow-edge[train]'"
            )
            click.echo(f"piflow-edge: {missing}", err=True)
            context.exit(missing.exit_code)


@click.group(cls=Group, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="piflow-edge")
def main():
    """Distil flow-matching image generators to 1-4 network calls, export them, run them without PyTorch."""


def _emit(value) -> None:
    click.echo(json.dumps(value, indent=2))


def _say(line: str) -> None:
    click.echo(line, err=True)


def _is_main_process() -> bool:
    """Whether nobody else reports: of the processes that a launcher starts, the first does."""
    return os.environ.get("RANK", "0") == "0"


def _show(table) -> None:
    from rich.console import Console

    # Not a terminal: wide enough for every column, so that a file or a pipe gets whole lines.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


@main.command()
@click.option("--out", type=FOLDER, default=Path("demo"), help="Folder for students, bundles and report.")
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    help="Training steps of every student; else 1400, 400 and 300 for 1, 2 and 4 calls.",
)
@click.option("--images", type=click.IntRange(min=100), default=2000, help="Images per row of the table.")
@SEED
@JSON
def demo(out, iterations, images, seed, as_json):
    """The main job on handwritten digits: distil, export, sample, score, report.

    Stopped with Ctrl-C, the same command goes on where it was.

    \b
    Example:
      piflow-edge demo --out demo
    """
    from dataclasses import replace

    from .demo import DemoConfig, run_demo
    from .report import text_table

    config = DemoConfig(images=images, seed=seed)
    if iterations is not None:
        config = replace(config, iterations=dict.fromkeys(config.iterations, iterations))
    page, evaluation = run_demo(out, config, say=_say)
    if as_json:
        _emit({"report": str(page), **evaluation.as_json()})
    else:
        _show(text_table(evaluation))
        click.echo(f"report: {page.resolve()}")


def _data(source: str, size, autoencoder: Path | None):
    from .distill.data import load_images

    images = load_images(source, size=size)
    if autoencoder is None:
        return images
    from .distill.autoencoder import encode, load_autoencoder

    return encode(images, load_autoencoder(autoencoder))


@main.command("train-teacher")
@DATA
@IMAGE_SIZE
@AUTOENCODER
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint.")
@click.option("--iterations", type=click.IntRange(min=1), default=3000, help="Training steps.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=128, help="Images per step, over all processes."
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, help="Of Adam.")
@click.option("--patch-size", type=click.IntRange(min=1), default=2, help="Side of a token in pixels.")
@click.option("--hidden-size", type=click.IntRange(min=4), default=64, help="Width of a token.")
@click.option("--depth", type=click.IntRange(min=1), default=4, help="Transformer blocks.")
@click.option("--num-heads", type=click.IntRange(min=1), default=4, help="Attention heads.")
@click.option("--weights-only", is_flag=True, help="Leave a small float16 checkpoint that cannot be resumed.")
@SEED
@PRECISION
@run_options
@RESUME
def train_teacher(
    data, size, autoencoder, out, iterations, batch_size, learning_rate, patch_size, hidden_size, depth, num_heads,
    weights_only, seed, mixed_precision, resume, **run,
):  # fmt: skip
    """Train a small class-conditional DiT with flow matching.

    On several GPUs: accelerate launch --multi_gpu -m piflow_edge.cli train-teacher, and the same options.

    \b
    Example:
      piflow-edge train-teacher --data digits --out runs/teacher
    """
    from .distill.checkpoint import inference_only, save_checkpoint
    from .distill.dit import DiTConfig
    from .distill.teacher import FlowMatchingConfig, train_teacher
    from .distill.training import RunConfig, TrainingConfig

    images = _data(data, size, autoencoder)
    architecture = DiTConfig(
        in_channels=images.shape[0],
        sample_size=images.shape[1:],
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=len(images.class_names),
    )
    training = TrainingConfig(
        iterations=iterations,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        ema_decay=0.9995,
        mixed_precision=mixed_precision,
    )
    checkpoint = train_teacher(
        images, architecture, FlowMatchingConfig(), training, out, run=RunConfig(**run), resume=resume
    )
    if _is_main_process():
        if weights_only:
            save_checkpoint(out, inference_only(checkpoint))
        click.echo(out)


def _calls(context, parameter, text: str | None) -> list[int]:
    if text is None:
        return []
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise click.BadParameter(f"give calls per image, separated by commas, such as 1,2,4; got {text!r}")
    return [int(nfe) for nfe in text.split(",")]


@main.command()
@click.option("--teacher", "source", metavar="SOURCE",
              help="Checkpoint of train-teacher, package.module:function, SiT file, diffusers folder or hub id; "
              "else the shipped digits teacher.")  # fmt: skip
@click.option(
    "--teacher-style", type=click.Choice(["sit", "repa", "piflow"]), default="sit", help="Of a SiT file."
)
@DATA
@IMAGE_SIZE
@AUTOENCODER
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint.")
@click.option("--nfe", callback=_calls, default="1", metavar="NFE,...",
              help="Network calls per image to train for; 1,2,4 trains one student for each of them.")  # fmt: skip
@click.option("--policy", type=click.Choice(["gm", "dx", "dx-polynomial"]), default="gm", help="Gaussian mixture, "
              "grid of x_0 predictions, or polynomial.")  # fmt: skip
@click.option("--components", type=click.IntRange(min=1), default=8, help="K of a Gaussian mixture.")
@click.option("--nodes", type=click.IntRange(min=1), default=10, help="N of a DX policy.")
@click.option("--guidance", type=click.FloatRange(min=1), default=1.5, help="Guidance scale of the teacher.")
@click.option(
    "--guidance-interval", type=(float, float), metavar="LOW HIGH", help="Noise levels it is guided at."
)
@click.option("--orthogonal-guidance", type=click.FloatRange(0, 1), default=0.0,
              help="Share of the guidance along x_0 that is taken out.")  # fmt: skip
@click.option(
    "--shift", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Of the noise levels."
)
@click.option("--dynamic-shift", type=(int, int, float, float), metavar="BASE MAX BASE_LOG MAX_LOG",
              help="Shift by resolution instead: two sequence lengths, and their shifts' logarithms.")  # fmt: skip
@click.option("--final-step-size-scale", type=click.FloatRange(0, 1, min_open=True), default=1.0,
              help="Length of the last segment relative to the others.")  # fmt: skip
@click.option(
    "--substeps", type=click.IntRange(min=1), default=128, help="Euler steps of the policy, in all."
)
@click.option("--intermediate-states", type=click.IntRange(min=1), default=2,
              help="Points of a segment at which the teacher corrects.")  # fmt: skip
@click.option("--window-substeps", type=click.IntRange(min=0), default=0,
              help="Substeps over which velocities are averaged before they are compared.")  # fmt: skip
@click.option("--gm-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0,
              help="Share of components left out of the path.")  # fmt: skip
@click.option(
    "--loss-scale", type=click.FloatRange(min=0, min_open=True), default=1.0, help="Factor of the loss."
)
@click.option("--decay-iterations", type=click.IntRange(min=0), default=0,
              help="Steps over which the teacher's share of the path falls from 1 to 0.")  # fmt: skip
@click.option("--data-free", is_flag=True, help="Start from pure noise and go through all segments.")
@click.option(
    "--lora", "rank", type=click.IntRange(min=1), help="Train adapters of this rank, not all weights."
)
@click.option(
    "--lora-targets", default="all-linear", help="Ends of layer names to adapt, separated by commas."
)
@click.option("--iterations", type=click.IntRange(min=1), default=1400, help="Training steps.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, help="Images per step, over all processes."
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3, help="Of Adam.")
@SEED
@PRECISION
@run_options
@RESUME
def distill(
    source, teacher_style, data, size, autoencoder, out, nfe, policy, components, nodes, guidance,
    guidance_interval, orthogonal_guidance, shift, dynamic_shift, final_step_size_scale, substeps,
    intermediate_states, window_substeps, gm_dropout, loss_scale, decay_iterations, data_free, rank,
    lora_targets, iterations, batch_size, learning_rate, seed, mixed_precision, resume, **run,
):  # fmt: skip
    """Distil a teacher into a few-step student with pi-ID.

    On several GPUs: accelerate launch --multi_gpu -m piflow_edge.cli distill, and the same options.

    \b
    Example:
      piflow-edge distill --nfe 1 --out runs/student-1
    """
    from .demo import shipped_teacher
    from .distill.heads import DXHead, GMHead
    from .distill.imitation import ImitationConfig
    from .distill.lora import LoRAConfig
    from .distill.sources import load_teacher
    from .distill.student import distill
    from .distill.teacher import GuidanceConfig
    from .distill.training import RunConfig, TrainingConfig
    from .schedule import resolution_shift

    images = _data(data, size, autoencoder)
    if dynamic_shift is not None:
        base, largest, base_logshift, max_logshift = dynamic_shift
        shift = resolution_shift(
            math.prod(images.shape[1:]),  # positions of the state
            base_seq_len=base,
            max_seq_len=largest,
            base_logshift=base_logshift,
            max_logshift=max_logshift,
        )
    imitation = ImitationConfig(
        nfe=tuple(nfe),
        shift=shift,
        final_step_size_scale=final_step_size_scale,
        total_substeps=substeps,
        num_intermediate_states=intermediate_states,
        window_substeps=window_substeps,
        gm_dropout=gm_dropout,
        loss_scale=loss_scale,
        decay_iterations=decay_iterations,
        data_free=data_free,
    )
    grid = DXHead(nodes, mode="polynomial" if policy == "dx-polynomial" else "grid")
    distill(
        load_teacher(source or shipped_teacher(), sample_shape=images.shape, style=teacher_style),
        images,
        imitation,
        TrainingConfig(
            iterations=iterations,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            mixed_precision=mixed_precision,
        ),
        out,
        guidance=GuidanceConfig(guidance, guidance_interval, orthogonal_guidance),
        head=GMHead(components) if policy == "gm" else grid,
        lora=LoRAConfig(rank, float(rank), tuple(lora_targets.split(","))) if rank else None,
        run=RunConfig(**run),
        resume=resume,
    )
    if _is_main_process():
        click.echo(out)


@main.command("train-features")
@click.option("--data", default="digits", help="'digits', an .npz, or a folder with one folder per class.")
@IMAGE_SIZE
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="ONNX file to write."
)
@click.option("--epochs", type=click.IntRange(min=1), default=40, help="Passes over the images.")
@SEED
@JSON
def train_features(data, size, out, epochs, seed, as_json):
    """Train a small classifier on your images, whose features `evaluate` can compare them in.

    Figures measured in one such file can be set beside each other, so keep it.

    \b
    Example:
      piflow-edge train-features --data images.npz --out features.onnx
    """
    from .distill.data import load_images
    from .export.feature_extractor import train_features

    if out.suffix.lower() != ".onnx":
        raise click.UsageError(
            f"features are written as ONNX; give --out a name that ends in .onnx; got {out}"
        )
    trained = train_features(load_images(data, size=size), out, epochs=epochs, seed=seed)
    if as_json:
        _emit({"file": str(out), "accuracy": trained.accuracy, "images": trained.images})
    else:
        for part, share in trained.accuracy.items():
            _say(f"{part.replace('_', ' ')}: {share:.1%} of {trained.images[part]} images right")
        click.echo(out)


@main.command()
@click.argument("students", nargs=-1, type=click.Path(path_type=Path))
@click.option("--data", default="digits", help="The real images: 'digits', an .npz, or a folder per class.")
@IMAGE_SIZE
@click.option("--features", help="digits, a feature extractor as .onnx, or Inception-v3 weights as .pth; "
              "else digits for the digits.")  # fmt: skip
@click.option("--value-range", type=click.Choice(["-1,1", "0,1", "0,255", "imagenet"]),
              help="Of the .onnx file's input; else what train-features wrote into it, else -1,1.")  # fmt: skip
@click.option("--teacher", type=FOLDER,
              help="Checkpoint of the teacher; else for digits the shipped one, for other data none.")  # fmt: skip
@click.option("--no-teacher", is_flag=True, help="Compare with the real images alone.")
@click.option("--images", type=click.IntRange(min=100), default=2000, help="Images per contender.")
@click.option("--teacher-steps", type=click.IntRange(min=1), default=50, help="Euler steps of the teacher.")
@click.option("--guidance", type=click.FloatRange(min=1), help="Of the teacher; else the first student's.")
@click.option("--out", type=FOLDER, help="Write report.html, pictures and evaluation.json here.")
@SEED
@JSON
def evaluate(
    students, data, size, features, value_range, teacher, no_teacher, images, teacher_steps, guidance, out, seed,
    as_json,
):  # fmt: skip
    """Is it any good? Score bundles against their teacher and the real images, from the same noise.

    Quality (FID, KID, precision, density), diversity (recall, coverage, class by class) and agreement with the teacher
    are measured in the features of a network; --out adds the pictures side by side.

    \b
    Example:
      piflow-edge evaluate demo/bundles/digits-nfe1 --json
      piflow-edge evaluate bundles/* --data images.npz --teacher runs/teacher --features features.onnx --out report
    """
    from .demo import shipped_teacher
    from .distill.data import load_images
    from .evaluation import evaluate
    from .features import open_features
    from .report import text_table, write_report

    if no_teacher and teacher is not None:
        raise click.UsageError("--teacher and --no-teacher exclude each other")
    if value_range is not None and features is None:
        raise click.UsageError("--value-range is that of a --features file; give one")
    if teacher is None and data == "digits" and not no_teacher:
        teacher = shipped_teacher()
    evaluation = evaluate(
        students,
        teacher,
        data=load_images(data, size=size),
        features=None if features is None else open_features(features, value_range=value_range),
        count=images,
        seed=seed,
        guidance_scale=guidance,
        teacher_steps=teacher_steps,
    )
    if out is not None:
        _say(f"report: {write_report(out, evaluation, title='piflow-edge evaluation', notes=[])}")
    if as_json:
        _emit(evaluation.as_json())
    else:
        _show(text_table(evaluation))


@main.command()
@click.argument("checkpoint", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="Folder of the bundle.")
@click.option("--name", help="Name of the bundle; else the folder's.")
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, help="Recorded as the default.")
@click.option("--sampler-graph", "samplers", callback=_calls, metavar="NFE,...",
              help="Also write the whole sampler as one graph, for each of these calls per image: 1,2,4.")  # fmt: skip
@click.option("--autoencoder", type=FOLDER,
              help="Folder of the autoencoder the latents are of; its decoder goes into the bundle.")  # fmt: skip
@click.option("--license", "license_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file that becomes the bundle's LICENSE.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the bundle at --out.")
@JSON
def export(checkpoint, out, name, temperature, samplers, autoencoder, license_file, overwrite, as_json):
    """Write a student as a bundle that runs without PyTorch, checked against PyTorch.

    \b
    Example:
      piflow-edge export runs/student-1 --out bundles/digits
    """
    from .distill.autoencoder import load_autoencoder
    from .distill.checkpoint import load_checkpoint
    from .export.to_bundle import NO_LICENSE, export_bundle

    try:
        license_text = license_file.read_text(encoding="utf-8") if license_file else NO_LICENSE
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--license must be a text file in UTF-8: {error}") from error
    rows = export_bundle(
        load_checkpoint(checkpoint, kind="student"),
        out,
        name=name,
        temperature=temperature,
        samplers=samplers,
        autoencoder=load_autoencoder(autoencoder) if autoencoder else None,
        license_text=license_text,
        license_name=license_file.name if license_file else "unstated",
        overwrite=overwrite,
    )
    _report_rows(rows, as_json, {"bundle": str(out)})
    if not as_json:
        click.echo(out)


@main.command()
@BUNDLE
@click.option("--labels", required=True, help="Class ids or names, separated by commas: one image each.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="PNG file, or a folder for one each."
)
@click.option("--nfe", type=click.IntRange(min=1), help="Network calls per image; else the bundle's.")
@click.option("--substeps", type=click.IntRange(min=1), help="Euler steps of the policy; else the bundle's.")
@click.option("--solver", type=click.Choice(["euler", "multistep"]), default="euler",
              help="Euler as trained, or a quarter of the policy's evaluations.")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(min=0), help="Of the mixture; else the bundle's.")
@click.option("--engine", default="auto", help="Backend to run on: auto or ort.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the starting noise.")
@JSON
def sample(bundle, labels, out, nfe, substeps, solver, temperature, engine, seed, as_json):
    """Draw images from a bundle.

    A PNG file shows all images side by side; a folder gets one PNG per image.

    \b
    Example:
      piflow-edge sample demo/bundles/digits-nfe1 --labels 3,7 --seed 7 --out digits.png
    """
    from .files import write_atomic
    from .pictures import image_grid, png_bytes
    from .sampling import load

    if out.suffix.lower() not in ("", ".png"):
        raise click.UsageError(
            f"images are written as PNG; give --out a name that ends in .png, or a folder; got {out}"
        )
    generator = load(bundle, engine=engine)
    wanted = [_label(text, generator.class_names) for text in labels.split(",")]
    settings = {"nfe": nfe, "substeps": substeps, "solver": solver, "temperature": temperature}
    result = generator(wanted, seed=seed, **settings)
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        files = {out: image_grid([result.images])}
    else:
        out.mkdir(parents=True, exist_ok=True)
        files = {
            out / f"{s}-{i}.png": image for (s, i), image in zip(result.seeds, result.images, strict=True)
        }
    for path, image in files.items():
        write_atomic(path, png_bytes(image))
    if as_json:
        timings = {stage: round(ms, 3) for stage, ms in result.timings.items()}
        run = {"engine": result.engine, "device": result.device, "seeds": result.seeds, "timings_ms": timings}
        _emit({"files": [str(path) for path in files], **run})
    else:
        _say(f"{result.engine} on {result.device}, {result.timings['total']:.1f} ms")
        for path in files:
            click.echo(path)


def _label(text: str, names: tuple[str, ...]):
    text = text.strip()
    return int(text) if text not in names and text.isascii() and text.isdecimal() else text


@main.command()
@BUNDLE
@click.option("--engine", default="auto", help="Backend to run on: auto or ort.")
@JSON
def verify(bundle, engine, as_json):
    """Check a bundle's files, and that it reproduces its golden samples here. Exit status 1 if not.

    \b
    Example:
      piflow-edge verify demo/bundles/digits-nfe1
    """
    from .sampling import load
    from .verification import check, verify

    generator = load(bundle, engine=engine)
    rows = verify(generator)
    _report_rows(rows, as_json, {"bundle": str(bundle), "engine": generator.engine.name})
    check(rows, generator.bundle.name)


def _report_rows(rows, as_json: bool, context: dict) -> None:
    if as_json:
        layers = [{**vars(row), "passed": row.passed} for row in rows]
        _emit({**context, "passed": all(row.passed for row in rows), "layers": layers})
        return
    from rich.table import Table

    table = Table("layer", "worst error", "allowed", "in", "")
    for row in rows:
        cells = (row.layer, f"{row.error:.2e}", f"{row.tolerance:.0e}", row.where)
        table.add_row(*cells, "ok" if row.passed else "FAILED")
    _show(table)


@main.command()
@BUNDLE
@JSON
def inspect(bundle, as_json):
    """Show what a bundle holds, after checking all its files.

    \b
    Example:
      piflow-edge inspect demo/bundles/digits-nfe1
    """
    from dataclasses import asdict

    from .bundle import Bundle

    manifest = Bundle(bundle).manifest
    if as_json:
        _emit(asdict(manifest))
        return
    from rich.table import Table

    schedule, policy, latent = manifest.schedule, manifest.policy, manifest.latent
    decoder, shape = manifest.decoder, lambda sizes: " x ".join(map(str, sizes))
    scaled = f", scale {latent.scale}, shift {latent.shift}" if latent.kind == "latents" else ""
    decoded = f"{decoder.kind}, to images of {shape(decoder.outputs[0].shape[1:])}" if decoder else "none"
    sizes = {name: spec.size for name, spec in manifest.files.items()}
    table = Table(title=f"bundle {manifest.name}", show_header=False)
    for key, value in {
        "network calls per image": schedule.nfe,
        "policy": {
            "gm": lambda: f"Gaussian mixture, {policy.num_components} components",
            "dx": lambda: f"DX {policy.mode}, {policy.num_nodes} nodes",
        }[policy.kind](),
        "schedule": f"shift {schedule.shift}, {schedule.total_substeps} substeps, h {schedule.h}, "
        f"temperature {schedule.temperature}",
        latent.kind: shape(latent.shape) + scaled,
        "decoder": decoded,
        "classes": ", ".join(manifest.conditioning.class_names),
        "precisions": ", ".join(manifest.precisions),
        "sampler graphs": ", ".join(f"NFE {nfe}" for nfe in manifest.samplers) or "none",
        "ONNX opset": manifest.network.opset,
        "parameters": f"{manifest.provenance.get('parameters', 0):,}",
        "files": "\n".join(f"{name}  {size:,} bytes" for name, size in sizes.items()),
        "licence": manifest.license,
        "made with": ", ".join(f"{k} {v}" for k, v in manifest.provenance.get("versions", {}).items()),
    }.items():
        table.add_row(key, str(value))
    _show(table)


if __name__ == "__main__":
    main()
