"""A few-step network, and what must be known to run it: what every source of students gives, and export takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from piflow_edge.conditioning import Conditioner, Unconditional
from piflow_edge.distill.networks.flow_network import FlowNetwork, find_misfit
from piflow_edge.errors import CheckpointError, PiFlowError
from piflow_edge.schedule import Schedule, ShiftBySize


@dataclass(frozen=True)
class StudentModel:
    """A few-step network, and what must be known to run it.

    Args:
        network: with a policy head, ready to be called.
        nfe: calls per image it was trained for; several of one student for several.
        shift, final_step_size_scale, total_substeps: of the schedule it was trained with; see `Schedule`.
        conditioner: what steers it.
        latent: `scale` and `shift` of the latents it makes, see `data.Latent`, and perhaps `mean` and `deviation` of
            every channel, see `LatentSpec`; None where it makes pixels.
        substep_rule: of its schedule; see `Schedule`.
        sides: least and greatest height and width of the states, and what both are multiples of, where the network
            takes several sizes; those of `network.sample_shape` are the usual ones. None is one size.
        shift_by_size: the shift of each size, where it has several; `shift` is then that of `network.sample_shape`.
        or_more: whether it is good for more calls than those it was trained for, too.
        provenance: JSON, for the record; it names no folder of this machine.

    Raises:
        CheckpointError: the network is no student, or conditioner, schedule and network do not fit.
    """

    network: FlowNetwork
    nfe: int | tuple[int, ...] = 1
    shift: float = 1.0
    final_step_size_scale: float = 1.0
    total_substeps: int = 128
    conditioner: Conditioner = field(default_factory=Unconditional)
    latent: Mapping[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    substep_rule: Literal["round", "ceil"] = "round"
    or_more: bool = False
    sides: tuple[int, int, int] | None = None
    shift_by_size: ShiftBySize | None = None

    def __post_init__(self):
        if self.network.head is None:
            raise CheckpointError("a student has a policy head; attach the one it was trained with")
        if problem := find_misfit(self.network, self.conditioner):
            raise CheckpointError(f"{problem}; the student's conditioner: {self.conditioner.summarize()}")
        try:
            for nfe in self.nfes:
                self.schedule(nfe)
        except PiFlowError as error:
            raise CheckpointError(f"the student's schedule is unusable: {error}") from error

    def schedule(self, nfe: int) -> Schedule:
        """The schedule of `nfe` calls per image."""
        sizes = (self.shift, self.final_step_size_scale, self.total_substeps)
        return Schedule(nfe, *sizes, substep_rule=self.substep_rule)

    @property
    def nfes(self) -> tuple[int, ...]:
        """Calls per image it was trained for, rising."""
        return tuple(sorted({self.nfe} if isinstance(self.nfe, int) else set(self.nfe)))
