"""Commands about pictures: `demo`, `evaluate`, `sample`."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import click

from .options import (
    BUNDLE,
    COUNT,
    FOLDER,
    IMAGE_SIZE,
    JSON,
    SEED,
    TRUSTED_KEYS,
    emit,
    engine_options,
    engine_settings,
    say,
    show,
    temperature,
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
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

    from piflow_edge.evaluation.report import text_table

    from .demo import DemoConfig, run_demo

    config = DemoConfig(images=images, seed=seed)
    if iterations is not None:
        config = replace(config, iterations=dict.fromkeys(config.iterations, iterations))
    page, evaluation = run_demo(out, config, say=say)
    if as_json:
        emit({"report": str(page), **evaluation.as_json()})
    else:
        show(text_table(evaluation))
        click.echo(f"report: {page.resolve()}")


@click.command()
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
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.evaluation.comparison import evaluate
    from piflow_edge.evaluation.features import open_features
    from piflow_edge.evaluation.report import text_table, write_report

    from .demo import shipped_teacher

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
        say(f"report: {write_report(out, evaluation, title='piflow-edge evaluation', notes=[])}")
    if as_json:
        emit(evaluation.as_json())
    else:
        show(text_table(evaluation))


@click.command()
@BUNDLE
@click.option("--labels", help="Class ids or names, separated by commas: one image each.")
@click.option("--count", type=COUNT, help="Images in all where there are no classes; else of each label.")
@click.option("--like", type=FILE, help="Make the images of this PNG file again, by the settings it holds.")
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="File, or a folder for one file each.")  # fmt: skip
@click.option("--output", type=click.Choice(["png", "uint8", "float", "latent"]), default="png",
              help="Pictures, or arrays as .npy: bytes, numbers from 0 to 1, or what the decoder gets.")  # fmt: skip
@click.option("--nfe", type=COUNT, help="Network calls per image; else the bundle's.")
@click.option("--substeps", type=COUNT, help="Euler steps of the policy; else the bundle's.")
@click.option("--solver", type=click.Choice(["euler", "multistep"]), default="euler",
              help="Euler as trained, or a quarter of the policy's evaluations.")  # fmt: skip
@click.option("--temperature", callback=temperature, metavar="NUMBER|auto",
              help="Of the mixture, 0 or more, or auto, the published rule for --nfe; else the bundle's.")  # fmt: skip
@click.option("--h", help="Strength of the noise added between calls, 0 or more, or inf; else the bundle's.")
@click.option("--noise", type=FILE, help="Starting noise as .npy, (B, C, H, W), instead of the seed's.")
@click.option(
    "--image", type=FILE, help="Start from this picture, or latents as .npy; give --strength or --mask."
)
@click.option("--strength", type=float, help="Noise level to start from --image at, above 0 and up to 1.")
@click.option("--mask", type=FILE, help="White where to draw into --image; the rest stays as it is.")
@click.option("--resamples", type=click.IntRange(min=0),
              help="More calls for each, by which what is drawn fits what --mask keeps; else 4.")  # fmt: skip
@engine_options
@click.option("--precision", help="One of the bundle's; else its first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the noise.")
@TRUSTED_KEYS
@JSON
@click.pass_context
def sample(
    context, bundle, labels, like, out, output, engine, device, threads, cores, precision, trusted_keys, as_json,
    **settings,
):  # fmt: skip
    """Draw images from a bundle.

    BUNDLE is a folder, or digits, the bundle that comes with piflow-edge. A PNG file holds the image, or
    several side by side, small ones enlarged; a folder gets one PNG per image. Each holds the settings that make it
    again: see --like.

    \b
    Example:
      piflow-edge sample digits --labels 3,7 --seed 7 --out digits.png
      piflow-edge sample digits --like digits.png --out again.png
    """
    from dataclasses import asdict

    from piflow_edge.errors import EngineError, MissingExtraError
    from piflow_edge.runtime.images import open_array, open_image
    from piflow_edge.runtime.loading import load
    from piflow_edge.runtime.recipe import read_recipe

    suffix = ".png" if output == "png" else ".npy"
    if out.suffix.lower() not in ("", suffix):
        raise click.UsageError(
            f"with --output {output}, give --out a name that ends in {suffix}, or a folder; got {out}"
        )
    recipe = None
    if like is not None:
        _refuse_beside_like(context)
        recipe = read_recipe(like)
        precision = recipe.precision
        if not _given(context, "engine"):
            engine = recipe.engine
            device = device if _given(context, "device") else recipe.device
    readers = {"noise": open_array, "image": open_image, "mask": open_image}
    given = {name: settings.pop(name) for name in readers}
    given = {name: None if path is None else readers[name](path) for name, path in given.items()}
    given["output"] = {"png": "pil", "uint8": "numpy"}.get(output, output)
    opened = engine_settings(engine, device, threads, cores)
    try:
        loaded = load(bundle, precision=precision, trusted_keys=trusted_keys, **opened)
    except (EngineError, MissingExtraError) as error:
        if recipe is None or _given(context, "engine"):
            raise
        raise EngineError(
            f"{error}; --like takes the engine of {like}, {engine!r} on {recipe.device}: --engine chooses another, "
            "such as auto, whose image is the same but for rounding"
        ) from error
    with loaded as generator, _bar() as advance:
        if recipe is not None:
            result = generator.make_again(recipe, **given, callback=advance)
        else:
            if labels is not None:
                labels = [_label(text, generator.class_names) for text in labels.split(",")]
            result = generator(labels, **settings, **given, callback=advance)
    files = _pictures(out, result) if output == "png" else _arrays(out, result)
    if as_json:
        timings = {stage: round(ms, 3) for stage, ms in result.timings.items()}
        run = {
            "engine": result.engine,
            "device": result.device,
            "seeds": result.recipe.seeds,
            "timings_ms": timings,
        }
        emit({"files": [str(path) for path in files], **run, "recipe": asdict(result.recipe)})
    else:
        say(f"{result.engine} on {result.device}, {result.timings['total']:.1f} ms")
        for path in files:
            click.echo(path)


def _given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _refuse_beside_like(context: click.Context) -> None:
    free = {"bundle", "like", "out", "output", "noise", "image", "mask", "trusted_keys", "as_json"}
    free |= {"engine", "device", "threads", "cores"}
    for parameter in context.command.params:
        if parameter.name not in free and _given(context, parameter.name):
            raise click.UsageError(f"--like says what {parameter.opts[0]} is; leave one of both out")


@contextmanager
def _bar():
    """A callback for the generator that moves a progress bar, where somebody is looking."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sampling", total=None)

        def advance(done) -> None:
            bar.update(
                task, total=done.nfe, completed=done.call, description=f"image {done.first + 1} and on"
            )

        yield advance


def _pictures(out: Path, result) -> list[Path]:
    from piflow_edge.runtime.pictures import VISIBLE, image_grid, png_bytes
    from piflow_edge.system.files import write_atomic

    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        # One that can be seen as it is gets no margin: it may be the --image of the next call.
        alone = len(result.images) == 1 and max(result.images[0].size) >= VISIBLE
        sheet = result.images[0] if alone else image_grid([result.images])
        write_atomic(out, png_bytes(sheet, result.recipe))
        return [out]
    out.mkdir(parents=True, exist_ok=True)
    files = _names(out, result, ".png")
    for i, (file, image) in enumerate(zip(files, result.images, strict=True)):
        write_atomic(file, png_bytes(image, result.recipe.of(i)))
    return files


def _names(out: Path, result, suffix: str) -> list[Path]:
    """One file per image, named for its seed and index; --like may make several of one, with a third number."""
    files, seen = [], Counter()
    for pair in result.recipe.seeds:
        again = f"-{seen[pair]}" if seen[pair] else ""
        files.append(out / f"{pair[0]}-{pair[1]}{again}{suffix}")
        seen[pair] += 1
    return files


def _arrays(out: Path, result) -> list[Path]:
    import numpy as np

    from piflow_edge.system.files import atomic_file

    arrays = result.latents if result.images is None else result.images
    if out.suffix:
        out.parent.mkdir(parents=True, exist_ok=True)
        files = {out: arrays}
    else:
        out.mkdir(parents=True, exist_ok=True)
        files = dict(zip(_names(out, result, ".npy"), arrays, strict=True))
    for path, array in files.items():
        with atomic_file(path) as file:
            np.save(file, array)
    return list(files)


def _label(text: str, names: tuple[str, ...]):
    text = text.strip()
    return int(text) if text not in names and text.isascii() and text.isdecimal() else text
