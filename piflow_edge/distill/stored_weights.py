"""Large weights that stay in their files, of the type that they have there, and are float32 while a layer computes.

A transformer of twelve billion weights is 24 GB in its files, which the system maps, and would be 48 GB in float32.
Here a layer widens its weights before it computes and lets them go after, so that memory holds one layer's.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

# Values of a weight from which on it stays in its file.
LARGE = 1 << 20
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


class StoredWeight:
    """A weight as its file has it, and low-rank products that are added to it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._added: list[tuple[Tensor, Tensor, float]] = []

    def add_product(self, up: Tensor, down: Tensor, scale: float) -> None:
        """Add `scale * up down` to the weight, each time that it is widened."""
        self._added.append((up, down, scale))

    def replace(self, tensor: Tensor) -> None:
        """Take another weight in the place of this one, whatever is added to it."""
        self.tensor = tensor
        self._added.clear()

    @torch.no_grad()
    def widen(self) -> Tensor:
        """The weight in float32."""
        wide = self.tensor.to(torch.float32, copy=True)
        for up, down, scale in self._added:
            wide.add_(up.float() @ down.float(), alpha=scale)
        return wide


def leave_in_files(module: nn.Module, least: int | None = None) -> None:
    """Replace large parameters by stand-ins that take no memory; a layer has its own while its `forward` runs.

    All other parameters and buffers become float32. A stand-in is NaN, so that code which reads a layer's weights from
    outside of it is found out.

    Args:
        module: as it was loaded, in the type of its files, whose content is mapped.
        least: values of a large parameter; None is `LARGE`.
    """
    least = LARGE if least is None else least
    stand_ins: dict[int, nn.Parameter] = {}  # by the parameter: some are shared
    for layer in module.modules():
        large = []
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if parameter.numel() < least or parameter.ndim < 2:
                parameter.data = parameter.data.float()
                continue
            if id(parameter) not in stand_ins:
                stand_ins[id(parameter)] = _make_stand_in(parameter)
            layer._parameters[name] = stand_ins[id(parameter)]
            large.append(name)
        for name, buffer in layer._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                layer._buffers[name] = buffer.float()
        if large:
            layer.register_forward_pre_hook(_take_weights)
            layer.register_forward_hook(_let_go, always_call=True)


def find_stored(parameter: Tensor) -> StoredWeight | None:
    """The weight that a parameter stands in for; None where it is its own."""
    return getattr(parameter, "stored", None)


def has_stored(module: nn.Module) -> bool:
    """Whether weights of a module stay in their files."""
    return any(map(find_stored, module.parameters()))


@torch.no_grad()
def add_product(parameter: Tensor, up: Tensor, down: Tensor, scale: float) -> None:
    """Add `scale * up down` to a parameter, wherever its values are."""
    if stored := find_stored(parameter):
        stored.add_product(up, down, scale)
    else:
        parameter.add_((up.float() @ down.float()).to(parameter), alpha=scale)


@torch.no_grad()
def replace_weight(parameter: Tensor, tensor: Tensor) -> None:
    """Give a parameter other values, wherever its own are."""
    if stored := find_stored(parameter):
        stored.replace(tensor)
    else:
        parameter.copy_(tensor)


def read_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and contents of a module's `state_dict`, sorted, stored weights in float32, one at a time."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in sorted(module.state_dict().items()):
        stored = find_stored(parameters[name]) if name in parameters else None
        yield name, tensor if stored is None else stored.widen()


def find_stored_type(folder: Path) -> torch.dtype:
    """The type that the weights in a folder of safetensors all have, where it is one of 16 bits; else float32."""
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118  # no mapping
    return _HALF.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _make_stand_in(parameter: nn.Parameter) -> nn.Parameter:
    stand_in: Any = nn.Parameter(torch.full((), torch.nan).expand(parameter.shape), requires_grad=False)
    stand_in.stored = StoredWeight(parameter.data)
    return stand_in


def _take_weights(layer: nn.Module, _) -> None:
    if torch.compiler.is_exporting():  # a graph is told of its weights by their names
        return
    for name, parameter in layer._parameters.items():
        if parameter is not None and (stored := find_stored(parameter)):
            wide: Any = nn.Parameter(stored.widen(), requires_grad=False)
            wide.stand_in = parameter
            layer._parameters[name] = wide


def _let_go(layer: nn.Module, *_) -> None:
    for name, parameter in layer._parameters.items():
        layer._parameters[name] = getattr(parameter, "stand_in", parameter)
