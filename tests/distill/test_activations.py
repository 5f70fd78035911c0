import copy

import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from piflow_edge.distill.networks.activations import quicken  # noqa: E402
from piflow_edge.distill.networks.dit import DiT, DiTConfig  # noqa: E402


def quick_gelu():
    module = nn.GELU(approximate="tanh")
    quicken(module)
    return module


def exact(x):
    return F.gelu(x.double(), approximate="tanh")


def test_values_and_gradients_are_those_of_gelu_at_all_sizes_of_numbers():
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, torch.inf])])
    inputs, expected = x.clone().requires_grad_(), x.double().requires_grad_()
    quick_gelu()(inputs).sum().backward()
    exact(expected).sum().backward()
    # Beside numbers of up to 1 in float32; larger ones are passed on, within a few roundings.
    torch.testing.assert_close(quick_gelu()(x), exact(x).float(), atol=3e-7, rtol=3e-7)
    finite = x.isfinite()
    # 1 - gate is known to 2^-24, and multiplied by up to 35 where it vanishes; torch's own is off by half as much.
    torch.testing.assert_close(inputs.grad[finite], expected.grad[finite].float(), atol=35 * 2**-24, rtol=0)


# torch's own forward-mode derivatives use what it warns about.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_derivatives_forwards_twice_and_per_sample_are_those_of_gelu():
    x, tangent = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    given = torch.func.jvp(quick_gelu(), (x,), (tangent,))[1]
    torch.testing.assert_close(given, torch.func.jvp(exact, (x,), (tangent,))[1].float())

    def second(gelu, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(gelu(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    torch.testing.assert_close(second(quick_gelu(), x), second(exact, x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.func.vmap(quick_gelu())(x), exact(x).float())


def test_a_quick_network_gives_the_same_and_keeps_its_hooks_and_its_weights():
    torch.manual_seed(0)
    network = DiT(DiTConfig(hidden_size=16, depth=1, num_heads=2))
    nn.init.normal_(network.blocks[0].modulation.weight, std=0.5)
    nn.init.normal_(network.head.out.weight, std=0.5)
    calls = []
    network.blocks[0].mlp[1].register_forward_hook(lambda *_: calls.append(1))
    quick = copy.deepcopy(network)
    quicken(quick)
    inputs = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 4, 10])
    torch.testing.assert_close(quick(*inputs), network(*inputs))
    assert len(calls) == 2
    assert quick.state_dict().keys() == network.state_dict().keys()


def test_other_kinds_of_gelu_are_left_alone():
    erf, own = nn.GELU(), type("GELU", (nn.GELU,), {})(approximate="tanh")
    kinds = type(erf), type(own)
    quicken(nn.Sequential(erf, own))
    assert (type(erf), type(own)) == kinds


def test_half_precision_and_export_see_the_plain_function():
    x = torch.randn(7)
    assert torch.equal(quick_gelu()(x.bfloat16()), F.gelu(x.bfloat16(), approximate="tanh"))
    graph = torch.export.export(nn.Sequential(quick_gelu()), (x,)).graph
    assert "aten.gelu.default" in {str(node.target) for node in graph.nodes}
