"""How near a student's images come to its teacher's, from the same noise: what says whether to train on."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from piflow_edge.conditioning import Conditioner
from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.distill.teacher import GuidedTeacher, as_tensors
from piflow_edge.noise import philox_normal

# Images that are compared, and how the teacher makes them: the same for every run, so that figures can be compared.
COUNT, TEACHER_STEPS = 16, 50
# Noise that sheets of samples do not start from.
_SEED = 1
# Images at a time: a teacher that hardly fits a training step must not meet a larger batch here.
_PIECE = 4

# (network, noise (B, C, *S), conditioning) -> x_0, a student's images.
Draw = Callable[[nn.Module, Tensor, Mapping[str, Tensor]], Tensor]


class Agreement:
    """Compares a student with its teacher, on noise that training does not see.

    Args:
        guided: the teacher, whose images are made when they are first needed, once.
        draw: makes a student's images.
        network: for the shape of the states.
        conditioner: whose examples steer both.
        shift: of the noise levels.
    """

    def __init__(
        self,
        guided: GuidedTeacher,
        draw: Draw,
        network: FlowNetwork,
        conditioner: Conditioner,
        *,
        shift: float,
    ):
        self._guided, self._draw, self._shift = guided, draw, shift
        self._wanted: Tensor | None = None
        self._noise = torch.from_numpy(philox_normal(_SEED, range(COUNT), network.sample_shape))
        self._given = as_tensors(conditioner.example(COUNT))

    @torch.no_grad()
    def measure(self, network: nn.Module) -> float:
        """Mean squared difference between the images of `network` and the teacher's, in the network's units."""
        device = next(network.parameters()).device
        if self._wanted is None:
            self._wanted = self._make(self._sample_teacher, device)
        drawn = self._make(lambda noise, given: self._draw(network, noise, given), device)
        return (drawn - self._wanted).square().mean().item()

    def _sample_teacher(self, noise: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        return self._guided.sample(noise, TEACHER_STEPS, shift=self._shift, **given)

    def _make(self, make: Callable[[Tensor, Mapping[str, Tensor]], Tensor], device: torch.device) -> Tensor:
        return torch.cat([make(*piece).float().cpu() for piece in self._pieces(device)])

    def _pieces(self, device: torch.device):
        for start in range(0, COUNT, _PIECE):
            piece = slice(start, start + _PIECE)
            yield self._noise[piece].to(device), {k: v[piece].to(device) for k, v in self._given.items()}
