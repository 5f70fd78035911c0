"""The command that makes pictures: `sample`."""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import click

from .options import (
    BUNDLE,
    COUNT,
    JSON,
    TRUSTED_KEYS,
    emit,
    engine_options,
    engine_settings,
    say,
    temperature,
)

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


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
