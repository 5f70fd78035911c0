"""Distil a teacher into a few-step student with pi-ID."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.errors import DataError
from piflow_edge.policies import GMPolicy
from piflow_edge.sampling import decode, sample
from piflow_edge.schedule import Schedule

from .checkpoint import Checkpoint
from .data import ImageData
from .dit import student_from_teacher
from .imitation import ImitationConfig, imitation_loss
from .processes import unwrapped
from .teacher import GuidedTeacher, preview_inputs
from .training import DEFAULT_RUN, Loss, RunConfig, TrainingConfig, train


def policy_of(
    network: nn.Module, x_src: Tensor, sigma_src: np.ndarray, labels: Tensor, *, eps: float
) -> GMPolicy:
    """One student call: the policy for the segment that starts at `x_src` (B, C, H, W), `sigma_src` (B,)."""
    t = torch.from_numpy(sigma_src).to(x_src) * unwrapped(network).config.num_timesteps
    return GMPolicy(*network(x_src, t, labels), x_src, sigma_src, eps=eps)


def student_loss(guided: GuidedTeacher, imitation: ImitationConfig) -> Loss:
    """The imitation loss of a class-conditional student, for `train`."""

    def loss(network, x_0, conditioning, random):
        labels = conditioning["labels"]
        return imitation_loss(
            lambda x_src, sigma: policy_of(network, x_src, sigma, labels, eps=imitation.policy_eps),
            lambda x_t, sigma: guided.velocity(x_t, sigma, labels.repeat(len(x_t) // len(labels))),
            x_0,
            imitation,
            random,
            teacher_takes_all=True,
        ).loss

    return loss


def distill(
    teacher: Checkpoint,
    data: ImageData,
    imitation: ImitationConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    guidance_scale: float,
    num_components: int,
    run: RunConfig = DEFAULT_RUN,
    resume: bool = False,
) -> Checkpoint:
    """Train a GM student that starts as its teacher, and leave its checkpoint in `folder`.

    Args:
        teacher: checkpoint of a velocity network.
        data: images the segments start from, noised.
        imitation, training: settings of the loss and of the loop.
        guidance_scale: of the teacher that corrects; the student needs no guidance afterwards.
        num_components: K of the mixture.
        run: how the run is carried out.
        resume: go on from the checkpoint in `folder`.

    Raises:
        DataError: the data's classes are not the teacher's.
        DataError, CheckpointError, CheckFailedError and others: see `training.train`.
    """
    if data.class_names != teacher.class_names:
        raise DataError(
            f"the teacher's classes are {', '.join(teacher.class_names)}; those of {data.name!r} are "
            f"{', '.join(data.class_names)}"
        )
    frozen = teacher.network()
    guided = GuidedTeacher(frozen, teacher.architecture, guidance_scale)
    network = student_from_teacher(teacher.network(), num_components, seed=training.seed)
    network.requires_grad_(True)
    schedule = Schedule(
        imitation.nfe, imitation.shift, imitation.final_step_size_scale, imitation.total_substeps
    )
    inputs = preview_inputs(network.config) if run.sample_every else ()

    def preview(network):
        noise, labels = (tensor.to(next(network.parameters()).device) for tensor in inputs)

        def call(x_src, sigma_src):
            levels = np.full(len(x_src), sigma_src)
            return policy_of(network, x_src, levels, labels, eps=imitation.policy_eps)

        return decode(sample(call, noise, schedule).cpu().numpy())

    settings = {
        "imitation": asdict(imitation),
        "guidance_scale": guidance_scale,
        "data": data.name,
        "teacher": teacher.settings,
        "teacher_sha256": teacher.fingerprint(),
    }
    loss = student_loss(guided, imitation)
    return train(
        network, loss, data, training, folder, kind="student", settings=settings, run=run, frozen=[frozen],
        preview=preview, resume=resume,
    )  # fmt: skip
