"""Commands that train: `train-teacher`, `distill`, `train-features`."""

import math
from pathlib import Path

import click

from .options import (
    AUTOENCODER,
    DATA,
    FOLDER,
    IMAGE_SIZE,
    JSON,
    PRECISION,
    RESUME,
    SEED,
    TEACHER,
    TEACHER_STYLE,
    PolicyName,
    calls,
    emit,
    is_main_process,
    run_options,
    say,
)


def _data(source: str, size, autoencoder: Path | None):
    from piflow_edge.distill.data.datasets import load_images

    images = load_images(source, size=size)
    if autoencoder is None:
        return images
    from piflow_edge.distill.data.autoencoder import encode, load_autoencoder

    return encode(images, load_autoencoder(autoencoder))


@click.command("train-teacher")
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
    from piflow_edge.distill.loop.checkpoint import inference_only, save_checkpoint
    from piflow_edge.distill.loop.training import RunConfig, TrainingConfig
    from piflow_edge.distill.networks.families import fit_architecture
    from piflow_edge.distill.teacher import FlowMatchingConfig, train_teacher

    images = _data(data, size, autoencoder)
    architecture = fit_architecture(
        images.shape, images.conditioner,
        patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads,
    )  # fmt: skip
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
    if is_main_process():
        if weights_only:
            save_checkpoint(out, inference_only(checkpoint))
        click.echo(out)


@click.command()
@TEACHER
@TEACHER_STYLE
@DATA
@IMAGE_SIZE
@AUTOENCODER
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint.")
@click.option("--nfe", callback=calls, default="1", metavar="NFE,...",
              help="Network calls per image to train for; 1,2,4 trains one student for each of them.")  # fmt: skip
@click.option("--policy", type=PolicyName(), default="gm", help="Gaussian mixture, "
              "grid of x_0 predictions, or polynomial.")  # fmt: skip
@click.option("--components", type=click.IntRange(min=1), default=8, help="K of a Gaussian mixture.")
@click.option("--nodes", type=click.IntRange(min=1), default=10, help="N of a DX policy.")
@click.option("--guidance", type=click.FloatRange(min=1), help="Guidance scale of the teacher; else 1.5, or 1 "
              "where nothing stands for 'no condition'.")  # fmt: skip
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
@click.option("--final-step-size-scale", type=click.FloatRange(min=0, min_open=True), default=1.0,
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
    from piflow_edge.distill.imitation import ImitationConfig
    from piflow_edge.distill.loop.training import RunConfig, TrainingConfig
    from piflow_edge.distill.networks.lora import LoRAConfig
    from piflow_edge.distill.sources import load_teacher
    from piflow_edge.distill.student import distill
    from piflow_edge.distill.teacher import GuidanceConfig
    from piflow_edge.kernels.rollout import integrate
    from piflow_edge.policies import name_policy_spec
    from piflow_edge.schedule import resolution_shift

    from .demo import shipped_teacher

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
        head=name_policy_spec(policy, num_components=components, num_nodes=nodes),
        lora=LoRAConfig(rank, float(rank), tuple(lora_targets.split(","))) if rank else None,
        run=RunConfig(**run),
        resume=resume,
        integrate=integrate,
    )
    if is_main_process():
        click.echo(out)


@click.command("train-features")
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
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.export.feature_extractor import train_features

    if out.suffix.lower() != ".onnx":
        raise click.UsageError(
            f"features are written as ONNX; give --out a name that ends in .onnx; got {out}"
        )
    trained = train_features(load_images(data, size=size), out, epochs=epochs, seed=seed)
    if as_json:
        emit({"file": str(out), "accuracy": trained.accuracy, "images": trained.images})
    else:
        for part, share in trained.accuracy.items():
            say(f"{part.replace('_', ' ')}: {share:.1%} of {trained.images[part]} images right")
        click.echo(out)
