"""Low-rank adapters (LoRA) on a student's trunk, through peft."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from piflow_edge.distill.configs import LoRAConfig
from piflow_edge.errors import MissingExtraError, ShapeError


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
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft divides by the rank: 1.5 is fine
            target_modules=linear,
        )
        peft.inject_adapter_in_model(settings, module)


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The module as it was before `inject_lora`."""
    layers = _find_adapted(module)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def fold_lora(module: nn.Module) -> None:
    """Add the adapters to the weights they adapt, and take them out: the same function, nothing left of peft."""
    names = {part: name for name, part in module.named_modules()}
    for part in _find_adapted(module):
        part.merge()
        parent, _, last = names[part].rpartition(".")
        setattr(module.get_submodule(parent), last, part.get_base_layer())


def _find_adapted(module: nn.Module) -> Sequence[Any]:
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


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
