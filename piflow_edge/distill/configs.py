"""The settings of training, each with its default, help and range.

Nothing here imports torch: the command line makes its options of these classes.
"""

import math
from dataclasses import dataclass, replace

from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.option import check_options, option

# Guidance of a teacher that can be guided, unless said otherwise.
USUAL_GUIDANCE = 1.5


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained. A run is resumed with the same settings, but for `iterations` and `batch_size`.

    The learning rate is reached after `warmup` steps of linear rise, then it falls: to 0 at the end along half a
    cosine; or with the square root of the steps, which leaves the end open. A run that is made longer goes on with the
    rate that its new length gives at the step it has come to.
    `ema_decay` is that of the averaged weights, lower at the start. Gradients longer than `max_grad_norm` are shortened
    to it. `mixed_precision` is that of the networks.

    Raises:
        ScheduleError: a setting out of range.
    """

    iterations: int = option(1400, "Training steps.", minimum=1)
    batch_size: int = option(64, "Images per step, over all processes.", minimum=1)
    learning_rate: float = option(2e-3, "Of Adam.", above=0)
    learning_rate_decay: str = option(
        "cosine", "How the learning rate falls.", choices=("cosine", "inverse-sqrt")
    )
    warmup: int = option(50, "Steps over which the learning rate rises.", minimum=0)
    ema_decay: float = option(0.999, "Of the averaged weights, those that are used.", minimum=0, below=1)
    max_grad_norm: float = 1.0
    seed: int = option(0, "Of everything random.", minimum=0, maximum=2**63 - 1)
    mixed_precision: str | None = option(
        None, "Of the networks; else what accelerate launch says, or no.", choices=("no", "bf16", "fp16")
    )

    def __post_init__(self):
        check_options(self)


# How a small teacher is trained from scratch: longer, from larger batches, and averaged over more steps.
TEACHER_TRAINING = TrainingConfig(iterations=3000, batch_size=128, ema_decay=0.9995)


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out. None of it is part of what is learnt: it may change when a run is resumed.

    Raises:
        ScheduleError: a setting out of range.
    """

    gradient_accumulation: int = option(
        1, "Pieces in which each process takes its share of a batch, to save memory.", minimum=1
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, more time."
    )
    compile: bool = option(
        False, "Compile the networks with torch.compile: minutes at the start, then faster steps."
    )
    max_skipped_in_a_row: int = option(
        10, "Steps without a finite loss and gradient after which the run stops.", minimum=1
    )
    save_every: int = option(500, "Steps between checkpoints.", minimum=1)
    log_every: int = option(50, "Steps between lines of log.jsonl.", minimum=1)
    sample_every: int = option(0, "Steps between sheets of samples, in samples/; 0 is none.", minimum=0)
    compare_every: int = option(
        200,
        "Steps between comparisons of a student with its teacher, from the same noise; 0 is none.",
        minimum=0,
    )
    tensorboard: bool = option(False, "Also log for TensorBoard, in tensorboard/.")

    def __post_init__(self):
        check_options(self)


DEFAULT_RUN = RunConfig()


@dataclass(frozen=True)
class NetworkSizes:
    """How large a network is that `train-teacher` trains from scratch.

    Raises:
        ShapeError: a size out of range.
    """

    patch_size: int = option(2, "Side of a token in pixels.", minimum=1)
    hidden_size: int = option(64, "Width of a token.", minimum=4)
    depth: int = option(4, "Transformer blocks.", minimum=1)
    num_heads: int = option(4, "Attention heads.", minimum=1)

    def __post_init__(self):
        check_options(self, ShapeError)


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Settings of the teacher's training loss.

    Logit-normal raw times lie mostly where images take shape (Esser et al., arXiv:2403.03206). The loss is that of
    velocities; below `sigma_floor` it no longer grows for a network that predicts x_0, whose error counts divided by
    the noise level.

    Raises:
        ScheduleError: a setting out of range.
    """

    shift: float = option(1.0, "Of the raw times at which the loss is taken.", above=0)
    noise_levels: str = option(
        "uniform", "How raw times are drawn before the shift.", choices=("uniform", "logit-normal")
    )
    condition_dropout: float = option(
        0.1, "Share of samples trained with 'no condition', for guidance.", minimum=0, maximum=1
    )
    sigma_floor: float = option(0.0, "Noise level below which the loss no longer grows.", minimum=0)

    def __post_init__(self):
        check_options(self)


@dataclass(frozen=True)
class GuidanceConfig:
    """How a teacher is guided.

    A scale of 1 is no guidance and asks the network once per call; more asks it twice, within `interval`. None is 1.5
    where something stands for "no condition", else 1; see `resolve`. The scale is 1 outside `interval`, to which both
    ends belong; None is everywhere.

    Raises:
        ScheduleError: a setting out of range.
    """

    scale: float | None = option(
        None,
        f"Guidance scale of the teacher; else {USUAL_GUIDANCE:g}, or 1 where nothing stands for 'no condition'.",
        minimum=1,
        title="guidance scale",
    )
    interval: tuple[float, float] | None = option(None, "Noise levels it is guided at.")
    orthogonal: float = option(
        0.0, "Share of the guidance along the predicted x_0 that is taken out.", minimum=0, maximum=1
    )

    def __post_init__(self):
        check_options(self)
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low <= high <= 1:
                raise ScheduleError(f"a guidance interval runs up within [0, 1]; got {self.interval}")
            object.__setattr__(self, "interval", (low, high))  # from JSON it comes as a list

    def resolve(self, has_null: bool) -> "GuidanceConfig":
        """Return it with a scale, which depends on whether there is a "no condition" to guide away from.

        Raises:
            ScheduleError: guidance is wanted and nothing says what "no condition" is.
        """
        if self.scale is None:
            return replace(self, scale=USUAL_GUIDANCE if has_null else 1.0)
        if self.scale > 1 and not has_null:
            raise ScheduleError(
                "guidance needs to know what stands for 'no condition'; give the null condition (arrays 'null_NAME' "
                f"beside 'cond_NAME' in the data), or guidance 1; got {self.scale:g}"
            )
        return self


UNGUIDED = GuidanceConfig(1.0)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and of what rank. The update of a layer is scaled by `alpha / rank`.

    Raises:
        ShapeError: a rank below 1.
    """

    rank: int = option(64, "Train adapters of this rank, not all weights.", minimum=1)
    alpha: float = 64.0
    targets: tuple[str, ...] = option(("all-linear",), "Ends of layer names to adapt, separated by commas.")

    def __post_init__(self):
        check_options(self, ShapeError)
        object.__setattr__(self, "targets", tuple(self.targets))  # from JSON they come as a list


@dataclass(frozen=True)
class ImitationConfig:
    """Settings of the imitation loss.

    Args:
        nfe: student calls per image the student is trained for, 1 or more; several numbers for one student that can
            do with any of them.
        sigma_floor: the loss counts errors of velocities, which for a network that predicts x_0 are its own divided by
            the noise level, without bound; below this level they no longer grow. None is what `distill` finds in the
            teacher's training, else 0.
        policy_eps: floor inside the policy; None is what the authors train with, 1e-6 for GM and 1e-4 for DX.

    Raises:
        ScheduleError: a setting out of range.
    """

    nfe: int | tuple[int, ...] = option(
        1, "Network calls per image to train for; 1,2,4 trains one student for each of them."
    )
    shift: float = option(1.0, "Of the noise levels.", above=0)
    final_step_size_scale: float = option(1.0, "Length of the last segment relative to the others.", above=0)
    total_substeps: int = option(128, "Euler steps of the policy, in all.", minimum=1)
    num_intermediate_states: int = option(2, "Points of a segment at which the teacher corrects.", minimum=1)
    window_substeps: int = option(
        0,
        "Substeps over which velocities are averaged before they are compared; 0 compares at the point.",
        minimum=0,
    )
    gm_dropout: float = option(0.0, "Share of components left out of the path.", minimum=0, below=1)
    loss_scale: float = option(1.0, "Factor of the loss.", above=0)
    sigma_floor: float | None = option(
        None,
        "Noise level below which the loss no longer grows; else that of the teacher's training, or 0.",
        minimum=0,
    )
    policy_eps: float | None = None
    decay_iterations: int = option(
        0,
        "Steps over which the teacher's share of the path falls from 1 to 0; 0 is no share at all.",
        minimum=0,
    )
    data_free: bool = option(
        False, "Start from pure noise and go through all segments, instead of from noised data in one."
    )

    def __post_init__(self):
        if isinstance(self.nfe, list | tuple):  # one number stays a number
            several = tuple(sorted(set(self.nfe)))
            object.__setattr__(self, "nfe", several[0] if len(several) == 1 else several)
        if not self.nfes or min(self.nfes) < 1:
            raise ScheduleError(f"nfe is 1 or more; got {self.nfe}")
        check_options(self)
        if not self.final_step_size_scale < math.inf:
            raise ScheduleError(f"final_step_size_scale is finite; got {self.final_step_size_scale}")

    @property
    def nfes(self) -> tuple[int, ...]:
        """All numbers of student calls it is trained for."""
        return self.nfe if isinstance(self.nfe, tuple) else (self.nfe,)

    def segment_length(self, nfe):
        """Raw time of every segment but the last, for `nfe` calls, a number or an array."""
        return 1 / (nfe - 1 + self.final_step_size_scale)

    def longest_segment(self, nfe: int) -> float:
        """Raw time that the longest segment, which may be the last, needs for `nfe` calls."""
        return self.segment_length(nfe) * max(self.final_step_size_scale, 1.0)

    def teacher_ratio(self, iteration: int) -> float:
        """Share of each segment that is walked with the teacher's velocity, at this iteration."""
        return 1 - min(iteration / self.decay_iterations, 1.0) if self.decay_iterations else 0.0
