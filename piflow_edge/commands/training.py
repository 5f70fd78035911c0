"""Commands that train: `train-teacher`, `distill`, `train-features`."""

from pathlib import Path

import click

from .options import (
    AUTOENCODER,
    COUNT,
    DATA,
    FOLDER,
    IMAGE_SIZE,
    JSON,
    RESUME,
    SEED,
    TEACHER,
    TEACHER_STYLE,
    PolicyName,
    calls,
    command,
    emit,
    field_option,
    is_main_process,
    say,
    settings_options,
)

_CONFIGS = "piflow_edge.distill.configs"
TEXT_ENCODER = click.option(
    "--text-encoder", "encoders", multiple=True, metavar="SOURCE",
    help="Folder or hub id of a text encoder of transformers: the captions in --data steer. Can be given again.",
)  # fmt: skip

MAX_TOKENS = click.option(
    "--max-tokens", type=COUNT, help="Longest caption or prompt in tokens; else the text encoder's."
)


def _load_data(source: str, size, autoencoder: Path | None):
    from piflow_edge.distill.data.datasets import load_images

    images = load_images(source, size=size)
    if autoencoder is None:
        return images
    from piflow_edge.distill.data.autoencoder import encode, load_autoencoder

    return encode(images, load_autoencoder(autoencoder))


def _load_for_distil(data: str, size, autoencoder: Path | None, encoders: tuple[str, ...], load):
    """Return the teacher, which `load` loads for states of a shape, and the data steered as it is."""
    prompts = Path(data)
    if prompts.suffix == ".txt" and prompts.is_file():
        from piflow_edge.distill.captioned import prompts_for_teacher

        teacher = load(None)
        shape = teacher.network.sample_shape
        return teacher, prompts_for_teacher(prompts, encoders, teacher.conditioner, shape)
    images = _load_data(data, size, autoencoder)
    teacher = load(images.shape)
    if not encoders:
        return teacher, images
    from piflow_edge.distill.captioned import caption_for_teacher

    return teacher, caption_for_teacher(images, encoders, teacher.conditioner)


@command("train-teacher")
@DATA
@IMAGE_SIZE
@AUTOENCODER
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint.")
@TEXT_ENCODER
@MAX_TOKENS
@settings_options("training", f"{_CONFIGS}:TEACHER_TRAINING")
@settings_options("flow_matching", f"{_CONFIGS}:FlowMatchingConfig")
@settings_options("sizes", f"{_CONFIGS}:NetworkSizes")
@click.option("--weights-only", is_flag=True, help="Leave a small float16 checkpoint that cannot be resumed.")
@settings_options("run", f"{_CONFIGS}:RunConfig")
@RESUME
def train_teacher(
    data,
    size,
    autoencoder,
    out,
    encoders,
    max_tokens,
    weights_only,
    resume,
    training,
    flow_matching,
    sizes,
    run,
):
    """Train a small DiT with flow matching, steered by classes or by captions.

    On several GPUs: accelerate launch --multi_gpu -m piflow_edge.cli train-teacher, and the same options.

    \b
    Example:
      piflow-edge train-teacher --data digits --out runs/teacher
      piflow-edge train-teacher --data photos --size 64 --text-encoder MiniLM --patch-size 8 --out runs/teacher
    """
    from piflow_edge.distill.loop.checkpoint import inference_only, save_checkpoint
    from piflow_edge.distill.networks.families import fit_architecture
    from piflow_edge.distill.teacher import train_teacher

    images = _load_data(data, size, autoencoder)
    if encoders:
        from piflow_edge.distill.captioned import caption_for_training

        images = caption_for_training(images, encoders, max_tokens=max_tokens)
    architecture = fit_architecture(images.shape, images.conditioner, **vars(sizes))
    checkpoint = train_teacher(images, architecture, flow_matching, training, out, run=run, resume=resume)
    if is_main_process():
        if weights_only:
            save_checkpoint(out, inference_only(checkpoint))
        click.echo(out)


@command()
@TEACHER
@TEACHER_STYLE
@DATA
@IMAGE_SIZE
@AUTOENCODER
@TEXT_ENCODER
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint.")
@click.option("--policy", type=PolicyName(), default="gm", help="Gaussian mixture, "
              "grid of x_0 predictions, or polynomial.")  # fmt: skip
@field_option("piflow_edge.policies:GMPolicySpec", "num_components", "components")
@field_option("piflow_edge.policies:DXPolicySpec", "num_nodes", "nodes")
@settings_options(
    "guidance",
    f"{_CONFIGS}:GuidanceConfig",
    {"scale": "guidance", "interval": "guidance_interval", "orthogonal": "orthogonal_guidance"},
    interval={"metavar": "LOW HIGH"},
)
@settings_options(
    "imitation",
    f"{_CONFIGS}:ImitationConfig",
    {"total_substeps": "substeps", "num_intermediate_states": "intermediate_states"},
    nfe={"type": str, "callback": calls, "metavar": "NFE,..."},
)
@click.option("--dynamic-shift", type=(int, int, float, float), metavar="BASE MAX BASE_LOG MAX_LOG",
              help="Shift by resolution instead: two sequence lengths, and their shifts' logarithms.")  # fmt: skip
@field_option(f"{_CONFIGS}:LoRAConfig", "rank", "lora", default=None)
@field_option(f"{_CONFIGS}:LoRAConfig", "targets", "lora_targets", metavar="TEXT")
@settings_options("training", f"{_CONFIGS}:TrainingConfig")
@settings_options("run", f"{_CONFIGS}:RunConfig")
@RESUME
def distill(
    source, teacher_style, data, size, autoencoder, encoders, out, policy, components, nodes, dynamic_shift, lora,
    lora_targets, resume, guidance, imitation, training, run,
):  # fmt: skip
    """Distil a teacher into a few-step student with pi-ID.

    On several GPUs: accelerate launch --multi_gpu -m piflow_edge.cli distill, and the same options.

    \b
    Example:
      piflow-edge distill --nfe 1 --out runs/student-1
      piflow-edge distill --teacher runs/teacher --data prompts.txt --data-free --text-encoder MiniLM --out runs/s
    """
    from piflow_edge.distill.configs import LoRAConfig
    from piflow_edge.distill.imitation import shift_by_resolution
    from piflow_edge.distill.sources import load_teacher
    from piflow_edge.distill.student import distill
    from piflow_edge.export.exportability import check_exportable
    from piflow_edge.kernels.rollout import integrate
    from piflow_edge.policies import name_policy_spec

    from .demo import shipped_teacher

    def load(shape):
        return load_teacher(source or shipped_teacher(), sample_shape=shape, style=teacher_style)

    teacher, images = _load_for_distil(data, size, autoencoder, encoders, load)
    distill(
        teacher,
        images,
        shift_by_resolution(imitation, images.shape, *dynamic_shift) if dynamic_shift else imitation,
        training,
        out,
        guidance=guidance,
        head=name_policy_spec(policy, num_components=components, num_nodes=nodes),
        lora=LoRAConfig(lora, float(lora), lora_targets) if lora else None,
        run=run,
        resume=resume,
        integrate=integrate,
        check=check_exportable if is_main_process() else None,
    )
    if is_main_process():
        click.echo(out)


@command("train-features")
@click.option("--data", default="digits", help="'digits', an .npz, or a folder with one folder per class.")
@IMAGE_SIZE
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="ONNX file to write."
)
@TEXT_ENCODER
@MAX_TOKENS
@click.option(
    "--iterations",
    type=click.IntRange(min=1),
    help="Training steps; else as many as 40 passes over the images take.",
)
@SEED
@JSON
def train_features(data, size, out, encoders, max_tokens, iterations, seed, as_json):
    """Train a small classifier on your images, whose features `evaluate` can compare them in.

    With --text-encoder, that of the students, images learn to be told apart by their captions: a second file beside
    --out, for --prompt-features, compares images with prompts. Figures measured in one such file can be set beside each
    other, so keep it.

    \b
    Example:
      piflow-edge train-features --data images.npz --out features.onnx
      piflow-edge train-features --data captioned.npz --text-encoder minilm --iterations 2000 --out emoji.onnx
    """
    from piflow_edge.distill.data.datasets import load_images
    from piflow_edge.export.feature_extractor import train_features, train_prompt_features
    from piflow_edge.system.files import check_place

    if out.suffix.lower() != ".onnx":
        raise click.UsageError(
            f"features are written as ONNX; give --out a name that ends in .onnx; got {out}"
        )
    check_place(out)
    images, files = load_images(data, size=size), [out]
    if encoders:
        from piflow_edge.distill.captioned import caption_for_training

        trained, beside = train_prompt_features(
            caption_for_training(images, encoders, max_tokens=max_tokens),
            out,
            iterations=iterations,
            seed=seed,
        )
        files.append(beside)
    else:
        trained = train_features(images, out, iterations=iterations, seed=seed)
    if as_json:
        names = {"file": str(out), "prompts_file": str(files[1])} if encoders else {"file": str(out)}
        emit({**names, "accuracy": trained.accuracy, "images": trained.images})
    else:
        for part, share in trained.accuracy.items():
            say(f"{part.replace('_', ' ')}: {share:.1%} of {trained.images[part]} images right")
        for file in files:
            click.echo(file)
