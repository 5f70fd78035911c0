"""Low-rank adapters (LoRA) on a student's trunk, through peft."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from piflow_edge.errors import MissingExtraError, ShapeError


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and of what rank.

    Args:
        rank: of the update of every layer, 1 or more.
        alpha: the update is scaled by `alpha / rank`.
        targets: ends of the names of the linear layers that get one, or "all-linear".
    """

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ("all-linear",)

    def __post_init__(self):
        if self.rank < 1:
            raise ShapeError(f"the rank of an adapter is 1 or more; got {self.rank}")
        object.__setattr__(self, "targets", tuple(self.targets))  # from JSON they come as a list


def inject_lora(module: nn.Module, config: LoRAConfig, *, leave_out: str, seed: int) -> None:
    """Put adapters into `module`, which start as no change; only they require gradients then.

    Args:
        module: changed in place.
        config: see `LoRAConfig`.
        leave_out: dotted name of a layer that gets none: the output layer.
        seed: of the adapters' first weights.

    Raises:
        ShapeError: no layer is called so.
        MissingExtraError: peft is not installed.
    """
    peft = _peft()
    linear = [
        name for name, part in module.named_modules() if isinstance(part, nn.Linear) and name != leave_out
    ]
    if config.targets != ("all-linear",):
        linear = [n for n in linear if any(n == end or n.endswith("." + end) for end in config.targets)]
    if not linear:
        raise ShapeError(
            f"no linear layer's name ends in any of {', '.join(config.targets)}; give ends of names such as "
            f"{', '.join(_examples(module))}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=linear)
        peft.inject_adapter_in_model(settings, module)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module as it was before `inject_lora`."""
    layers = _adapted(module)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def fold_lora(module: nn.Module) -> None:
    """Add the adapters to the weights they adapt, and take them out: the same function, nothing left of peft."""
    for name, part in list(module.named_modules()):
        if part in _adapted(module):
            part.merge()
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, part.get_base_layer())


def _adapted(module: nn.Module) -> Sequence[nn.Module]:
    tuners = _peft().tuners.tuners_utils
    return [part for part in module.modules() if isinstance(part, tuners.BaseTunerLayer)]


def _examples(module: nn.Module) -> list[str]:
    ends = {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    return sorted(ends)[:6]


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "LoRA needs 'peft'; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    return peft
