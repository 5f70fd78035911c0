"""Commands that score students: `demo`, `evaluate`."""

from pathlib import Path

import click

from .options import (
    BUNDLE_PATH,
    FOLDER,
    IMAGE_SIZE,
    JSON,
    SEED,
    TEACHER,
    TEACHER_STYLE,
    command,
    emit,
    say,
    show,
)
from .references import caption_real_images, open_source


@command()
@click.option("--out", type=FOLDER, default=Path("demo"), help="Folder for students, bundles and report.")
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    help="Training steps of every student; else 1400, 400 and 300 for 1, 2 and 4 calls.",
)
@click.option("--images", type=click.IntRange(min=100), default=2000, help="Images per row of the table.")
@click.option(
    "--emoji-sources",
    nargs=2,
    type=click.Path(exists=True, path_type=Path),
    metavar="TEACHER DATA",
    help="What the bundle 'emoji' was made of, a run and an .npz, to be shown beside it.",
)
@SEED
@JSON
def demo(out, iterations, images, emoji_sources, seed, as_json):
    """The main job on handwritten digits: distil, export, sample, score, report; and emoji from prompts.

    Stopped with Ctrl-C, the same command goes on where it was.

    \b
    Example:
      piflow-edge demo --out demo
    """
    from dataclasses import replace

    from piflow_edge.evaluation.report import text_table

    from .demo import DemoConfig, run_demo
    from .demo_emoji import EmojiSources

    config = DemoConfig(images=images, seed=seed)
    if iterations is not None:
        config = replace(config, iterations=dict.fromkeys(config.iterations, iterations))
    emoji = EmojiSources(*emoji_sources) if emoji_sources else None
    page, evaluation = run_demo(out, config, emoji=emoji, say=say)
    if as_json:
        emit({"report": str(page), **evaluation.as_json()})
    else:
        show(text_table(evaluation))
        click.echo(f"report: {page.resolve()}")


def open_inception(weights: Path):
    """Open an Inception's weights as features; PyTorch is imported only here."""
    from piflow_edge.distill.networks.inception import InceptionFeatures

    return InceptionFeatures(weights)


RANGES = click.Choice(["-1,1", "0,1", "0,255", "imagenet", "clip"])


def writable_folder(context, parameter, folder: Path | None) -> Path | None:
    if folder is not None:
        from piflow_edge.system.files import check_place

        check_place(folder)  # better known before minutes of scoring
    return folder


@command()
@click.argument("students", nargs=-1, **BUNDLE_PATH)
@click.option("--data", default="digits", help="The real images: 'digits', an .npz, or a folder per class.")
@IMAGE_SIZE
@click.option("--features", help="digits, a feature extractor as .onnx, or Inception-v3 weights as .pth; "
              "else digits for the digits.")  # fmt: skip
@click.option("--value-range", type=RANGES,
              help="Of the .onnx file's input; else what train-features wrote into it, else -1,1.")  # fmt: skip
@click.option("--prompt-features", "pair", nargs=2, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              metavar="IMAGES PROMPTS",
              help="Two .onnx files that compare images with prompts, such as CLIP's halves or what train-features "
              "--text-encoder writes.")  # fmt: skip
@click.option(
    "--prompt-value-range", type=RANGES, help="As --value-range, of the IMAGES of --prompt-features."
)
@TEACHER
@TEACHER_STYLE
@click.option("--no-teacher", is_flag=True, help="Compare with the real images alone.")
@click.option("--images", type=click.IntRange(min=100), default=2000, help="Images per contender.")
@click.option("--teacher-steps", type=click.IntRange(min=1), default=50, help="Euler steps of the teacher.")
@click.option("--guidance", type=click.FloatRange(min=1), help="Of the teacher; else the first student's.")
@click.option(
    "--out",
    type=FOLDER,
    callback=writable_folder,
    help="Write report.html, pictures and evaluation.json here.",
)
@SEED
@JSON
def evaluate(
    students, data, size, features, value_range, pair, prompt_value_range, source, teacher_style, no_teacher, images,
    teacher_steps, guidance, out, seed, as_json,
):  # fmt: skip
    """Is it any good? Score bundles against their teacher and the real images, from the same noise.

    STUDENTS are bundles, or folders of images that generate made: these are compared as they are, each with as many of
    its images of a class or prompt as are compared.

    Quality (FID, KID, precision, density), diversity (recall, coverage, class by class) and agreement with the teacher
    are measured in the features of a network; --out adds the pictures side by side. Where --data has captions and the
    students read prompts, these are the prompts, several images of each, and --prompt-features says whether images show
    them.

    \b
    Example:
      piflow-edge evaluate demo/bundles/digits-nfe1 --json
      piflow-edge evaluate bundles/* --data images.npz --teacher runs/teacher --features features.onnx --out report
    """
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.evaluation.comparison import evaluate
    from piflow_edge.evaluation.features import open_features
    from piflow_edge.evaluation.prompt_features import PromptFeatures
    from piflow_edge.evaluation.report import text_table, write_report
    from piflow_edge.runtime.bulk.bulk_job import has_job

    from .demo import shipped_teacher

    if no_teacher and source is not None:
        raise click.UsageError("--teacher and --no-teacher exclude each other")
    if value_range is not None and features is None:
        raise click.UsageError("--value-range is that of a --features file; give one")
    bundles = [path for path in students if not has_job(path)]
    real = caption_real_images(load_images(data, size=size), bundles)
    if source is None and data == "digits" and not no_teacher:
        source = shipped_teacher()
    extractor = None
    if features is not None:
        extractor = open_features(features, value_range=value_range, open_weights=open_inception)
    evaluation = evaluate(
        students,
        real,
        extractor,
        teacher=None if source is None else open_source(source, teacher_style, bundles, real),
        count=images,
        seed=seed,
        guidance_scale=guidance,
        teacher_steps=teacher_steps,
        prompt_features=PromptFeatures(*pair, value_range=prompt_value_range) if pair else None,
    )
    for warning in evaluation.warnings:
        say(f"warning: {warning}")
    if out is not None:
        say(f"report: {write_report(out, evaluation, title='piflow-edge evaluation', notes=[])}")
    if as_json:
        emit(evaluation.as_json())
    else:
        show(text_table(evaluation))
