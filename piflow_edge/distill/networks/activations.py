"""GELU by its tanh formula, on a CPU in six tenths of the time torch takes for it.

torch computes a tanh per number, which there takes longer than the matrix product before it. The formula is also
`x sigmoid(2 u)`, and torch's sigmoid takes less than half as long as its tanh.
"""

import math

import torch
from torch import Tensor, nn

# gelu(x) = x sigmoid(_LINEAR x + _CUBIC x^3); Hendrycks & Gimpel, arXiv:1606.08415.
_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def quicken(network: nn.Module) -> None:
    """Let every `nn.GELU(approximate="tanh")` of a network compute in the quicker way, in place.

    Results and gradients are the same to rounding. On a GPU, in half precision and under export nothing changes.
    """
    for module in network.modules():
        if type(module) is nn.GELU and module.approximate == "tanh":
            module.__class__ = QuickGELU  # hooks on it, and its place in the network, stay as they are


class QuickGELU(nn.GELU):
    """What `quicken` makes of an `nn.GELU`."""

    def forward(self, x: Tensor) -> Tensor:
        quick = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
        return _GELU.apply(x) if quick else super().forward(x)


class _GELU(torch.autograd.Function):
    # Keeps nothing but its input, as torch's does: what follows from it is quick enough to compute again.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _gate(x).mul_(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * _slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent * _slope(*ctx.saved_tensors)


def _gate(x: Tensor) -> Tensor:
    return torch.addcmul(x.new_tensor(_LINEAR), x, x, value=_CUBIC).mul(x).sigmoid_()


def _slope(x: Tensor) -> Tensor:
    gate = _gate(x)
    exponent = torch.addcmul(x.new_tensor(_LINEAR), x, x, value=3 * _CUBIC).mul(x)  # x times its derivative
    return torch.addcmul(gate, gate, torch.addcmul(exponent, exponent, gate, value=-1))
