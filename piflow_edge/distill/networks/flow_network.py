"""Any network as pi-Flow sees it: state, noise level and conditioning in, velocity or policy out.

Networks differ in what they predict, how they count time and where their output layer is. A `FlowNetwork` wraps one
and hides all that; a policy head turns it from a teacher into a student.
"""

import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from piflow_edge.conditioning import Conditioner
from piflow_edge.distill.stored_weights import read_weights
from piflow_edge.errors import ScheduleError, ShapeError
from piflow_edge.policies import PolicySpec

from .dit import DiT, DiTConfig
from .heads import PolicyProjection, widen_layer
from .lora import LoRAConfig, adapters_off, inject_lora

# Floors where a prediction is divided by the noise level, or by 1 minus it: a network that predicts noise says
# nothing about x_0 at pure noise.
_SIGMA_FLOOR, _ALPHA_FLOOR = 1e-4, 1e-3

Conditioning = Mapping[str, Tensor]


class Teacher(Protocol):
    """A velocity field to imitate."""

    def velocity(self, x_t: Tensor, sigma_t: Tensor, **conditioning: Tensor) -> Tensor:
        """u_t = dx/dsigma at states (B, C, *S), noise levels (B,), without gradient; shape of `x_t`."""
        ...


@dataclass(frozen=True)
class Convention:
    """How a network speaks.

    Args:
        predicts: "velocity", "x_0" or "noise".
        reversed_time: its time runs from 0 at noise to 1 at data, and its velocity points towards data.
        num_timesteps: its time at the end of that range; it is given `sigma_t * num_timesteps`, reversed or not.

    Raises:
        ScheduleError: another kind of prediction; `num_timesteps` is not above 0.
    """

    predicts: str = "velocity"
    reversed_time: bool = False
    num_timesteps: float = 1000.0

    def __post_init__(self):
        if self.predicts not in ("velocity", "x_0", "noise"):
            raise ScheduleError(f"a network predicts 'velocity', 'x_0' or 'noise'; got {self.predicts!r}")
        if not self.num_timesteps > 0:
            raise ScheduleError(f"num_timesteps is above 0; got {self.num_timesteps!r}")

    def time(self, sigma_t: Tensor) -> Tensor:
        """The network's time input at noise levels (B,)."""
        return (1 - sigma_t if self.reversed_time else sigma_t) * self.num_timesteps

    def velocity(self, prediction: Tensor, x_t: Tensor, sigma_t: Tensor) -> Tensor:
        """The network's prediction as u_t; all three broadcast."""
        if self.predicts == "velocity":
            return -prediction if self.reversed_time else prediction
        if self.predicts == "x_0":
            return velocity_towards(prediction, x_t, sigma_t)
        return (prediction - x_t) / (1 - sigma_t).clamp(min=_ALPHA_FLOOR)


def velocity_towards(x_0: Tensor, x_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The velocity of the straight line from `x_t` to `x_0`."""
    return (x_t - x_0) / sigma_t.clamp(min=_SIGMA_FLOOR)


class FlowNetwork(nn.Module):
    """A network with the conventions taken off; the base of all adapters.

    Args:
        module: the network itself. Kept in evaluation mode: what is random in training is the loss's, where it is
            seeded.
        sample_shape: of a state without the batch, (C, H, W) or (C, T, H, W).
        convention: what it predicts and how it counts time.
        output_layer: dotted name of the layer that writes the prediction.
        channel_major: whether that layer's rows run over channels first, a patch's places last.
        planes: channels of the prediction: C, or more of which the first C are used.
        null: what stands for "no condition", for guidance: one entry without the batch axis per name.
    """

    family: ClassVar[str]
    # Names of the conditioning that it needs, and of what else it takes. None: not known.
    inputs: tuple[str, ...] | None = None
    optional_inputs: tuple[str, ...] | None = None
    # Whether it runs code that nobody has exported before.
    is_untried: ClassVar[bool] = False
    # Of any library: what it has beside `forward`, its adapter knows.
    module: Any

    def __init__(
        self,
        module: nn.Module,
        sample_shape: tuple[int, ...],
        convention: Convention,
        *,
        output_layer: str,
        channel_major: bool = False,
        planes: int | None = None,
        null: Conditioning | None = None,
    ):
        super().__init__()
        self.module = module
        self.sample_shape, self.convention = tuple(sample_shape), convention
        self.output_layer, self.channel_major = output_layer, channel_major
        self.planes = planes or self.sample_shape[0]
        self.null = dict(null or {})
        self.head: PolicySpec | None = None
        self.lora: LoRAConfig | None = None
        self.origin: dict[str, Any] | None = None  # where it was read from; see `sources`
        self.eval()

    # What a family says about itself.

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Run the module: states (B, C, *S), its own time (B,), conditioning -> planes (B, M, *S)."""
        raise NotImplementedError

    def expect_planes(self, planes: int) -> None:
        """Tell the module how many planes its output layer writes, where it puts patches together itself."""
        if hasattr(self.module, "out_channels"):
            self.module.out_channels = planes

    @property
    def input_guidance(self) -> float | None:
        """The guidance scale that it reads as an input; None where it reads none."""
        return None

    def describe(self) -> dict[str, Any]:
        """JSON from which `sources.build` makes a network of this architecture; no weights."""
        raise NotImplementedError

    # What all have in common.

    def forward(self, x_t: Tensor, sigma_t: Tensor, **conditioning: Tensor) -> Tensor | tuple[Tensor, ...]:
        """A teacher's velocity (B, C, *S), or the parts of a student's policy.

        Args:
            x_t: states, (B, C, *S).
            sigma_t: noise levels, (B,).
            conditioning: whatever the module takes; `labels` (B,) for classes.

        Raises:
            ShapeError: the module's output is not made of as many planes as its output layer should write.
        """
        acting = self._as_teacher_now()
        head = None if acting else self.head
        expected = head.num_planes(self.sample_shape[0]) if head else self.planes
        dtype = next(self.module.parameters()).dtype
        planes = self.predict(x_t.to(dtype), self.convention.time(sigma_t), conditioning).to(
            torch.promote_types(dtype, torch.float32)
        )
        if planes.shape[1] != expected or planes.shape[2:] != x_t.shape[2:]:
            raise ShapeError(
                f"the network should write {expected} planes of {tuple(x_t.shape[2:])}; it wrote "
                f"{tuple(planes.shape[1:])}; is {self.output_layer!r} the layer that writes the prediction, and does "
                "the network read how many planes there are from its attribute out_channels?"
            )
        level = sigma_t.view(-1, *(1,) * (x_t.ndim - 1)).to(planes)
        if head is None:
            return self.convention.velocity(planes[:, : self.sample_shape[0]], x_t, level)
        return self.split(head, planes, x_t.unsqueeze(1), level.unsqueeze(1))

    def split(self, head: PolicySpec, planes: Tensor, x_t: Tensor, level: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of the policy that planes (B, M, *S) stand for, at `x_t` (B, 1, C, *S)."""
        return head.split(
            planes,
            lambda prediction: self.convention.velocity(prediction, x_t, level),
            lambda x_0: velocity_towards(x_0, x_t, level),
        )

    @torch.no_grad()
    def velocity(self, x_t: Tensor, sigma_t: Tensor, **conditioning: Tensor) -> Tensor:
        """The teacher's velocity, see `Teacher`; of a LoRA student that of the teacher it shares its trunk with.

        Raises:
            ShapeError: the network is a student that shares nothing with its teacher.
        """
        if self.head is None:
            return self(x_t, sigma_t, **conditioning)
        with self._as_teacher():
            return self(x_t, sigma_t, **conditioning)

    def train(self, mode: bool = True) -> "FlowNetwork":
        """As ever, but for the module, which stays in evaluation mode."""
        super().train(mode)
        self.module.eval()
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same network has the same, wherever its files are."""
        digest = hashlib.sha256()
        for name, tensor in read_weights(self):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _projection(self) -> nn.Module:
        return self.module.get_submodule(self.output_layer)

    def _as_teacher_now(self) -> bool:
        projection = self._projection()
        return isinstance(projection, PolicyProjection) and projection.as_teacher

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        projection = self._projection()
        if not isinstance(projection, PolicyProjection) or projection.teacher is None:
            raise ShapeError(
                "this student has a trunk of its own; ask its teacher's network for the velocity"
            )
        projection.as_teacher = True
        self.expect_planes(self.planes)
        try:
            with adapters_off(self.module):
                yield
        finally:
            projection.as_teacher = False
            if self.head is not None:
                self.expect_planes(self.head.num_planes(self.sample_shape[0]))


class DiTNetwork(FlowNetwork):
    """Our own DiT."""

    family = "dit"
    inputs, optional_inputs = ("labels",), ()

    def __init__(self, config: DiTConfig, convention: Convention | None = None, module: DiT | None = None):
        super().__init__(
            module or DiT(config),
            config.sample_shape,
            convention or Convention(),
            output_layer="head.out",
            null={"labels": torch.tensor(config.num_classes)},
        )
        self.config = config

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "DiTNetwork":
        """Return a network of this architecture; the weights mean nothing yet."""
        return cls(DiTConfig(**description["config"]), Convention(**description["convention"]))

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        return self.module(x_t, t, **conditioning)

    def describe(self):
        """See `FlowNetwork.describe`."""
        return {"config": asdict(self.config), "convention": asdict(self.convention)}


class ModuleNetwork(FlowNetwork):
    """Any module that takes state, time and conditioning, and returns its prediction.

    Args:
        module: called as `module(x_t, t, **conditioning)`.
        sample_shape, convention, channel_major, planes, null: see `FlowNetwork`.
        output_layer: dotted name of the layer that writes the prediction; None takes the module's last `Linear` or
            `Conv2d`. A module that puts patches together itself must read its attribute `out_channels` for it.
        names: what the module calls a conditioning input, where that is not what the data call it: {"labels": "y"}.
        entry: "package.module:function" that makes this network, so that a checkpoint of a student can be read.
    """

    family = "module"
    is_untried = True

    def __init__(
        self,
        module: nn.Module,
        sample_shape: tuple[int, ...],
        convention: Convention | None = None,
        *,
        output_layer: str | None = None,
        channel_major: bool = False,
        planes: int | None = None,
        null: Conditioning | None = None,
        names: Mapping[str, str] | None = None,
        entry: str | None = None,
    ):
        super().__init__(
            module,
            sample_shape,
            convention or Convention(),
            output_layer=output_layer or _last_layer(module),
            channel_major=channel_major,
            planes=planes,
            null=null,
        )
        self.names, self.entry = dict(names or {}), entry
        self.inputs, self.optional_inputs = _read_inputs(module, self.names)

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        return self.module(x_t, t, **{self.names.get(name, name): v for name, v in conditioning.items()})

    def describe(self):
        """See `FlowNetwork.describe`."""
        return {"entry": self.entry}


def attach_policy_head(
    network: FlowNetwork, head: PolicySpec, *, lora: LoRAConfig | None = None, seed: int = 0
) -> FlowNetwork:
    """A student that starts as its teacher: the output layer widened to a policy, everything else as it was.

    Args:
        network: the teacher. Without `lora` it is copied and left alone. With it, student and teacher are one set of
            frozen weights: the student's `velocity` is the teacher's, and `network` itself must not be used further.
        head: which policy.
        lora: train low-rank adapters and the output layer only; None trains everything.
        seed: of the components' offsets and of the adapters.

    Raises:
        ShapeError: `network` is a student already, or its output layer cannot be widened.
        MissingExtraError: `lora` without peft.
    """
    if network.head is not None:
        raise ShapeError("a policy head is attached to a teacher; this network has one already")
    student = network if lora else copy.deepcopy(network)
    channels, layer = student.sample_shape[0], student._projection()
    wide = widen_layer(layer, head, channels, student.planes, channel_major=student.channel_major, seed=seed)
    student.requires_grad_(lora is None)
    wide.requires_grad_(True)
    if lora:
        inject_lora(student.module, lora, leave_out=student.output_layer, seed=seed)
        wide = PolicyProjection(wide, teacher=layer)
    parent, _, name = student.output_layer.rpartition(".")
    setattr(student.module.get_submodule(parent), name, wide)
    student.expect_planes(head.num_planes(channels))
    student.head, student.lora = head, lora
    return student


def describe(network: FlowNetwork) -> dict[str, Any]:
    """Everything but the weights, as JSON; `sources.network_of` reads it."""
    return {
        "family": network.family,
        **network.describe(),
        "sample_shape": list(network.sample_shape),
        "head": asdict(network.head) if network.head else None,
        "lora": asdict(network.lora) if network.lora else None,
        "base": network.origin if network.lora else None,
    }


def find_misfit(network: FlowNetwork, conditioner: Conditioner) -> str | None:
    """Return why a network cannot be steered by `conditioner`; None where it can, as far as names tell."""
    given, needed = {spec.name for spec in conditioner.inputs}, network.inputs or ()
    if missing := [name for name in dict.fromkeys((*needed, *network.null)) if name not in given]:
        verb = "which is" if len(missing) == 1 else "which are"
        return f"the network is steered by {', '.join(map(repr, missing))}, {verb} not there"
    known = None if network.optional_inputs is None else {*needed, *network.optional_inputs}
    if known is not None and (unknown := sorted(given - known)):
        return f"the network has no input {unknown[0]!r}; it takes {', '.join(sorted(known)) or 'none'}"
    theirs = conditioner.null(1) or {}
    for name, own in network.null.items():
        if own.ndim == 0 and name in theirs and int(own) != int(theirs[name][0]):
            # The null class is the one after the last.
            return f"the network knows {int(own)} of {name!r}"
    return None


def _read_inputs(
    module: nn.Module, names: Mapping[str, str]
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the names of what steers a module beside state and time: what it needs, and what it can do without.

    `names`: what the module calls what the data call otherwise.
    """
    theirs = {own: name for name, own in names.items()}
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in parameters):
        return (), None
    needed = [theirs.get(p.name, p.name) for p in parameters[2:] if p.default is p.empty]
    free = [theirs.get(p.name, p.name) for p in parameters[2:] if p.default is not p.empty]
    return tuple(needed), tuple(free)


def _last_layer(module: nn.Module) -> str:
    layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ShapeError("the module has no Linear or Conv2d; name the layer that writes the prediction")
    return layers[-1]
