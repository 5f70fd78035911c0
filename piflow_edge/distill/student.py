"""Distil a teacher into a few-step student with pi-ID."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.distill.data.datasets import ImageData, check_same_latents
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.loop.training import (
    DEFAULT_RUN,
    Loss,
    Preview,
    RunConfig,
    TrainingConfig,
    check_fit,
    suggest_steering,
    train,
)
from piflow_edge.distill.networks.flow_network import FlowNetwork, Teacher, attach_policy_head, describe
from piflow_edge.distill.networks.lora import LoRAConfig
from piflow_edge.errors import CheckFailedError, DataError
from piflow_edge.integrator import Integrate, integrate
from piflow_edge.noise import philox_normal
from piflow_edge.policies import Policy, PolicySpec
from piflow_edge.sampling import Hooks, sample
from piflow_edge.schedule import Schedule
from piflow_edge.system.pixels import quantise_images

from .agreement import Agreement, Draw
from .configs import ImitationConfig
from .imitation import correct_at_once, correct_in_turn, datafree_imitation_loss, imitation_loss
from .sources import TeacherModel, ask_teacher, check_source, student_of_run
from .student_model import StudentModel
from .teacher import GuidanceConfig, GuidedTeacher, null_condition, preview_inputs, preview_titles


def policy_of(
    network: nn.Module,
    head: PolicySpec,
    x_src: Tensor,
    sigma_src: np.ndarray,
    conditioning: Mapping[str, Tensor],
    *,
    eps: float | None = None,
) -> Policy:
    """One student call: the policy for the segment that starts at `x_src` (B, C, *S), `sigma_src` (B,).

    Args:
        network: the student, or what a launcher has wrapped it in.
        head: of the student.
        eps: floor inside the policy; None is the authors' for training.
    """
    outputs = network(x_src, torch.from_numpy(sigma_src).to(x_src), **conditioning)
    kind = replace(head, eps=head.training_eps if eps is None else eps)
    return kind.policy(dict(zip(kind.outputs, outputs, strict=True)), x_src, sigma_src)


def student_loss(
    guided: GuidedTeacher, head: PolicySpec, imitation: ImitationConfig, integrate: Integrate = integrate
) -> Loss:
    """The imitation loss of a student, for `train`; `integrate` as in `distill`."""

    def loss(network, x_0, conditioning, random):
        def student(x_src, sigma_src):
            return policy_of(network, head, x_src, sigma_src, conditioning, eps=imitation.policy_eps)

        def teacher(x_t, sigma_t):
            times = len(x_t) // len(x_0)  # it may be asked about several points of every sample at once
            given = {k: v.repeat(times, *(1,) * (v.ndim - 1)) for k, v in conditioning.items()}
            return guided.velocity(x_t, sigma_t, **given)

        ratio = imitation.teacher_ratio(random.iteration)
        settings = {
            "teacher_ratio": ratio,
            "correct": correct_in_turn if ratio else correct_at_once,
            "integrate": integrate,
        }
        if imitation.data_free:
            noise = torch.from_numpy(random.normal(tuple(x_0.shape))).to(x_0)
            return datafree_imitation_loss(student, teacher, noise, imitation, random, **settings)[0]
        return imitation_loss(student, teacher, x_0, imitation, random, **settings).loss

    return loss


def distill(
    teacher: TeacherModel,
    data: ImageData,
    imitation: ImitationConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    guidance: GuidanceConfig,
    head: PolicySpec,
    lora: LoRAConfig | None = None,
    null: Mapping[str, Tensor] | None = None,
    run: RunConfig = DEFAULT_RUN,
    resume: bool = False,
    integrate: Integrate = integrate,
    check: Callable[[StudentModel], None] | None = None,
) -> Checkpoint:
    """Train a student that starts as its teacher, and leave its checkpoint in `folder`.

    Args:
        teacher: the network to imitate. With `lora` it is changed into the student's trunk.
        data: what the segments start from, noised; of a data-free run only their shape and conditions matter.
        imitation, training: settings of the loss and of the loop.
        guidance: of the teacher that corrects; the student needs no guidance afterwards.
        head: which policy. The nodes of a DX policy are laid over the student's longest segment, whatever the head
            says, in raw time of the shift it is trained with.
        lora: train adapters on the teacher's weights; None trains a copy of them.
        null: what stands for "no condition"; see `GuidedTeacher`. None is what the data or the network say.
        run: how the run is carried out.
        resume: go on from the checkpoint in `folder`.
        integrate: carries states along policies. The default computes as the formulas read;
            `piflow_edge.kernels.rollout.integrate` does the same in compiled kernels, and is what `piflow-edge distill`
            trains with.
        check: is called with the student before it is trained, and raises where nothing could be done with it
            afterwards; `piflow-edge distill` gives `piflow_edge.export.exportability.check_exportable`.

    Raises:
        CheckpointError: the student could not be read back from its checkpoint.
        DataError: the data's classes or latents are not the teacher's.
        CheckFailedError: the student does not start as its teacher.
        DataError, CheckpointError, CheckFailedError and others: see `training.train`.
    """
    check_teacher(teacher, data)
    check_images(data, imitation)
    imitation = inherit_floor(imitation, teacher)
    head = head.fit_to_segments(imitation.longest_segment(min(imitation.nfes)), imitation.shift)
    student = attach_policy_head(teacher.network, head, lora=lora, seed=training.seed)
    null = null_condition(teacher.network, data.conditioner) if null is None else null
    guided = GuidedTeacher(student if lora else teacher.network, guidance, null=null)
    check_start(student, guided.teacher, data.batch(np.arange(2) % len(data))[1])
    assert guided.guidance.scale is not None  # the guided teacher has put a number for "as the teacher can"
    draw = student_draw(head, imitation, integrate)
    agreement = None
    if run.compare_every:
        agreement = Agreement(guided, draw, student, data.conditioner, shift=imitation.shift).measure
    settings = {
        "imitation": asdict(imitation),
        "guidance": asdict(guided.guidance),
        "head": asdict(head),
        "data": data.name,
        "teacher": teacher.provenance,
    }
    check_source(describe(student))
    if check is not None:
        check(student_of_run(student, {**settings, **data.settings()}, data.conditioner, 0))
    return train(
        student,
        student_loss(guided, head, imitation, integrate),
        data,
        training,
        folder,
        kind="student",
        settings=settings,
        run=run,
        frozen=[] if lora else [teacher.network],
        preview=student_preview(student, data, draw) if run.sample_every else None,
        titles=preview_titles(data.conditioner) if run.sample_every else (),
        remark=describe_guidance(guided.guidance.scale, teacher.network.input_guidance),
        compare=agreement,
        resume=resume,
    )


def check_images(data: ImageData, imitation: ImitationConfig) -> None:
    """Raise DataError unless there are images where segments start from them."""
    if not (data.has_images or imitation.data_free):
        raise DataError(
            f"{data.name!r} holds prompts and no images; give --data-free, or images with captions"
        )


def inherit_floor(imitation: ImitationConfig, teacher: TeacherModel) -> ImitationConfig:
    """Return the settings with the `sigma_floor` of the teacher's training, where they name none."""
    if imitation.sigma_floor is not None:
        return imitation
    trained = teacher.provenance.get("settings", {}).get("flow_matching", {})
    return replace(imitation, sigma_floor=trained.get("sigma_floor", 0.0))


def describe_guidance(scale: float, input_scale: float | None) -> str:
    """Return how a teacher is guided; `input_scale`: what the network reads as its guidance, if it reads any."""
    how = "not guided" if scale == 1 else f"guided by {scale:g}"
    return f"the teacher is {how}" + (
        "" if input_scale is None else f", and reads guidance {input_scale:g} as an input"
    )


def check_teacher(teacher: TeacherModel, data: ImageData) -> None:
    """Raise DataError unless a teacher can correct students on these data."""
    if teacher.conditioner is not None and teacher.conditioner.to_json() != data.conditioner.to_json():
        raise DataError(
            f"the teacher was trained with other conditioning ({teacher.conditioner.summarize()}) than {data.name!r} "
            f"has ({data.conditioner.summarize()})" + suggest_steering(data)
        )
    if "settings" in teacher.provenance:  # of a teacher that was trained here
        check_same_latents(teacher.provenance["settings"], data)
    check_fit(teacher.network, data)


def student_draw(head: PolicySpec, imitation: ImitationConfig, integrate: Integrate) -> Draw:
    """Return what makes a student's images, with as many calls as it is trained for."""
    schedule = Schedule(
        max(imitation.nfes), imitation.shift, imitation.final_step_size_scale, imitation.total_substeps
    )

    def draw(network: nn.Module, noise: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        def call(x_src, sigma_src):
            levels = np.full(len(x_src), sigma_src)
            return policy_of(network, head, x_src, levels, conditioning, eps=imitation.policy_eps)

        return sample(call, noise, schedule, hooks=Hooks(integrate=integrate))

    return draw


def student_preview(student: FlowNetwork, data: ImageData, draw: Draw) -> Preview:
    """Return what makes the sheets of samples of a student."""
    noise, conditioning = preview_inputs(student, data.conditioner)

    def preview(network: nn.Module) -> np.ndarray:
        device = next(network.parameters()).device
        given = {name: tensor.to(device) for name, tensor in conditioning.items()}
        return quantise_images(draw(network, noise.to(device), given).cpu().numpy())

    return preview


@torch.no_grad()
def check_start(student: FlowNetwork, teacher: Teacher, conditioning: Mapping[str, np.ndarray]) -> None:
    """See that the student's policy is the teacher's velocity where it starts.

    Args:
        conditioning: of two samples.

    Raises:
        CheckFailedError: it is not. The output layer is another one, or its rows are ordered otherwise.
    """
    device = next(student.parameters()).device
    x_t = torch.from_numpy(philox_normal(0, range(2), student.sample_shape)).to(device)
    given = {name: torch.from_numpy(array).to(device) for name, array in conditioning.items()}
    sigma = np.full(len(x_t), 0.5)
    u_t = ask_teacher(teacher, x_t, torch.from_numpy(sigma).to(x_t), given)
    assert student.head is not None
    started = policy_of(student, student.head, x_t, sigma, given).velocity(x_t, sigma)
    off, size = (tensor.square().mean().sqrt().item() for tensor in (started - u_t, u_t))
    # The components' offsets are a tenth of this; rows in a wrong order are as far off as the velocity is large.
    if not off <= 0.2 + 0.5 * size:
        raise CheckFailedError(
            f"the student should start as its teacher, but its velocity is off by {off:.3g} where the teacher's is "
            f"{size:.3g}; is {student.output_layer!r} the layer that writes the prediction, and "
            f"channel_major={student.channel_major} the order of its rows?"
        )
