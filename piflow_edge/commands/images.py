"""The command that makes pictures: `sample`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from piflow_edge.system.progress import shows_bars

from .options import (
    BUNDLE,
    COUNT,
    JSON,
    KEEP,
    TRUSTED_KEYS,
    command,
    emit,
    engine_options,
    engine_settings,
    say,
    settings_options,
    temperature,
)
from .options import size as image_size

if TYPE_CHECKING:
    from piflow_edge.sampling_settings import SamplingSettings

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PROMPTS = click.option(
    "--prompts", type=FILE, help="Text file in UTF-8 with one prompt a line; empty lines are left out."
)
SIZE = click.option("--size", callback=image_size, metavar="SIDE|HEIGHTxWIDTH",
                    help="Of an image in pixels, where the bundle makes several; else its usual one.")  # fmt: skip


def sampling_options(without: Sequence[str] = ()) -> Callable:
    """Give a command the options of sampling, as `settings`. `without`: fields that get none."""
    return settings_options(
        "settings",
        "piflow_edge.sampling_settings:SamplingSettings",
        without=without,
        temperature={"type": str, "callback": temperature, "metavar": "NUMBER|auto"},
        h={"type": str},
    )


@command()
@BUNDLE
@click.option(
    "--labels", help="Class ids or names, separated by commas, ranges such as 0-9, or all: one image each."
)
@click.option(
    "--prompt", multiple=True, help="What to draw, for a bundle that reads prompts; can be given again."
)
@PROMPTS
@click.option("--array", "arrays", multiple=True, metavar="NAME=FILE",
              help="Input of the network as .npy, for a bundle that takes arrays; can be given again.")  # fmt: skip
@click.option("--count", type=COUNT, help="Images of each label, prompt or entry of --array; else in all.")
@click.option("--like", type=FILE, help="Make the images of this picture again, by the settings it holds.")
@click.option("--out", type=click.Path(path_type=Path, allow_dash=True), required=True,
              help="File, a folder for one file each, or - for stdout.")  # fmt: skip
@click.option("--output", type=click.Choice(["png", "uint8", "float", "latent"]), default="png",
              help="Pictures, or arrays as .npy: bytes, numbers from 0 to 1, or what the decoder gets.")  # fmt: skip
@sampling_options()
@click.option("--noise", type=FILE, help="Starting noise as .npy, (B, C, H, W), instead of the seed's.")
@click.option(
    "--image", type=FILE, help="Start from this picture, or latents as .npy; give --strength or --mask."
)
@click.option("--mask", type=FILE, help="White where to draw into --image; the rest stays as it is.")
@SIZE
@engine_options
@KEEP
@click.option("--precision", help="One of the bundle's; else its first.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the noise.")
@TRUSTED_KEYS
@JSON
@click.pass_context
def sample(
    context, bundle, like, out, output, engine, device, threads, cores, keep, precision, trusted_keys, as_json,
    **request,
):  # fmt: skip
    """Draw images from a bundle.

    BUNDLE is a folder, or emoji or digits, which come with piflow-edge. A file, PNG, WebP or JPEG by its suffix,
    holds the image, or several side by side, small ones enlarged; a folder gets one PNG per image. Each holds the
    settings that make it again: see --like.

    \b
    Example:
      piflow-edge sample digits --labels 3,7 --seed 7 --out digits.png
      piflow-edge sample digits --labels all --out digits
      piflow-edge sample digits --like digits.png --out again.png
    """
    from piflow_edge.runtime.recipe import read_recipe

    request["settings"] = set_size(request["settings"], request.pop("size"))
    request["prompt"] = [*request["prompt"], *read_prompts(request.pop("prompts"))] or None
    _check_out(out, output, as_json)
    recipe = None
    if like is not None:
        _refuse_beside_like(context)
        recipe = read_recipe(like)
        precision = recipe.precision
        if not _is_given(context, "engine"):
            engine = recipe.engine
            device = device if _is_given(context, "device") else recipe.device
    request.update(_read_files(request), output={"png": "pil", "uint8": "numpy"}.get(output, output))
    settings = engine_settings(engine, device, threads, cores, keep)
    chosen = recipe is None or _is_given(context, "engine")
    with (
        _bar() as advance,
        _load(
            bundle, None if chosen else recipe, precision=precision, trusted_keys=trusted_keys, **settings
        ) as generator,
    ):
        if recipe is None:
            result = generator(**request, callback=advance)
        else:
            given = {name: request[name] for name in ("arrays", "noise", "image", "mask", "output")}
            result = generator.make_again(recipe, **given, callback=advance)
    if str(out) == "-":
        try:
            result.write(sys.stdout.buffer)
            sys.stdout.buffer.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                error.filename = "standard output"
            raise
    else:
        _report(result, result.save(out), as_json)


def _check_out(out: Path, output: str, as_json: bool) -> None:
    from piflow_edge.runtime.pictures import PICTURE_SUFFIXES

    suffixes = PICTURE_SUFFIXES if output == "png" else (".npy",)
    if str(out) == "-":
        if as_json:
            raise click.UsageError("--out - and --json both write to stdout; leave one of both out")
    elif out.suffix.lower() not in ("", *suffixes):
        raise click.UsageError(
            f"with --output {output}, give --out a name that ends in {' or '.join(suffixes)}, or a folder; got {out}"
        )


def read_prompts(file: Path | None) -> list[str]:
    from piflow_edge.system.files import read_lines

    if file is None:
        return []
    try:
        prompts = read_lines(file)
    except UnicodeDecodeError as error:
        raise click.UsageError(f"--prompts must be a text file in UTF-8: {error}") from error
    if not prompts:
        raise click.UsageError(f"--prompts: {file} holds no prompt; write one a line")
    return prompts


def set_size(settings: "SamplingSettings", size: int | tuple[int, int] | None) -> "SamplingSettings":
    """Put height and width in the place of --size."""
    from dataclasses import replace

    if size is None:
        return settings
    if settings.height or settings.width:
        raise click.UsageError("--size is --height and --width at once; leave one or the others out")
    height, width = (size, size) if isinstance(size, int) else size
    return replace(settings, height=height, width=width)


def _read_files(options: dict) -> dict:
    """The arrays and pictures in the files that options name."""
    from piflow_edge.runtime.images import open_array, open_image

    arrays = {}
    for text in options["arrays"]:
        name, found, file = text.partition("=")
        if not (name and found and file) or name in arrays:
            raise click.UsageError(f"--array takes NAME=FILE, each name once; got {text!r}")
        arrays[name] = open_array(Path(file))
    readers = {"noise": open_array, "image": open_image, "mask": open_image}
    given = {name: options[name] and read(options[name]) for name, read in readers.items()}
    return {"arrays": arrays or None, **given}


def _load(bundle, recipe, **settings):
    """The generator; where the engine is that of a `recipe` and cannot run here, the error says how to get around."""
    from piflow_edge.errors import EngineError, MissingExtraError
    from piflow_edge.runtime.loading import load

    try:
        return load(bundle, **settings)
    except (EngineError, MissingExtraError) as error:
        if recipe is None:
            raise
        raise EngineError(
            f"{error}; --like takes the engine of the picture, {recipe.engine!r} on {recipe.device}: --engine chooses "
            "another, such as auto, whose image is the same but for rounding"
        ) from error


def _report(result, files: list[Path], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        timings = {stage: round(ms, 3) for stage, ms in result.timings.items()}
        run = {
            "engine": result.engine,
            "device": result.device,
            "seeds": result.recipe.seeds,
            "timings_ms": timings,
        }
        emit({"files": [str(path) for path in files], **run, "recipe": asdict(result.recipe)})
        return
    say(f"{result.engine} on {result.device}, {result.timings['total']:.1f} ms")
    for path in files:
        click.echo(path)


def _is_given(context: click.Context, option: str) -> bool:
    return context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE


def _refuse_beside_like(context: click.Context) -> None:
    free = {"bundle", "like", "out", "output", "arrays", "noise", "image", "mask", "trusted_keys", "as_json"}
    free |= {"engine", "device", "threads", "cores", "keep"}
    for parameter in context.command.params:
        if parameter.name not in free and _is_given(context, parameter.name):
            raise click.UsageError(f"--like says what {parameter.opts[0]} is; leave one of both out")


@contextmanager
def _bar():
    """A callback for the generator that moves a progress bar, where somebody is looking.

    The bar says too which network is opened: a large one takes longer than an image.
    """
    if not shows_bars():
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

        with _listening(lambda stage: bar.update(task, description=stage)):
            yield advance


@contextmanager
def _listening(show):
    """Show what is logged about networks that take turns."""
    import logging

    stages, handler = logging.getLogger("piflow_edge.runtime.residence"), logging.Handler(logging.INFO)
    handler.emit = lambda record: show(record.getMessage())
    level = stages.level
    stages.addHandler(handler)
    stages.setLevel(logging.INFO)
    try:
        yield
    finally:
        stages.removeHandler(handler)
        stages.setLevel(level)
