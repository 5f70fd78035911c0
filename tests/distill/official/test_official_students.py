"""The authors' students in every format of theirs give the forward passes that were recorded with their own code."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from piflow_edge.distill.official.checkpoint_files import read_official_files
from piflow_edge.distill.official.class_students import build_class_student
from piflow_edge.distill.official.students import load_official_student
from piflow_edge.distill.sources import load_student
from piflow_edge.errors import CheckpointError
from piflow_edge.policies import DXPolicySpec, GMPolicySpec
from tests.helpers.golden_cases import GOLDEN, cases

CHECKPOINTS = GOLDEN / "checkpoints"
FORMATS = {"folder": "", "released": "model.pth", "training": "train_checkpoint.pth"}
PARTS = {"gm": ("means", "logweights", "logstds"), "dx": ("output",)}
SIZE = (4, 6, 8)  # of the recorded latents


def recorded(name):
    return cases("checkpoint_forward", lambda case: case == name)[0]


def write_config(folder, name, **changes):
    """A student's config.json with `changes`, as one would write it for a file without a recorded policy."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads((CHECKPOINTS / name / "config.json").read_text()) | changes))
    return path


def check_parts(case, head, outputs):
    """Within four times the authors' own error in float32 and 1e-6 of the largest value, as their README asks."""
    for name, value in zip(PARTS[head.kind], outputs, strict=True):
        spread = case._spread[name]
        bound = 4 * spread["max_abs_err"] + 1e-6 * spread["max_abs_value"]
        np.testing.assert_allclose(value.numpy(), case[f"{name}_f64"], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("name", ["gmdit", "dxdit"])
def test_a_class_conditional_student_gives_the_recorded_outputs_log_std_too(name, written, tmp_path):
    policy = {"type": "DX", "segment_size": 0.5, "shift": 1.0}
    config = None if written == "folder" else write_config(tmp_path, name, policy_config=policy)
    student = load_student(str(CHECKPOINTS / name / FORMATS[written]), config=config)
    case = recorded(f"{name}/in0")
    x_t, t, labels = (torch.from_numpy(case[k]) for k in ("hidden_states", "timestep", "class_labels"))
    with torch.no_grad():
        outputs = student.network(x_t, t / 1000, labels=labels)
    check_parts(case, student.network.head, outputs)
    expected = GMPolicySpec(4, eps=1e-6) if name == "gmdit" else DXPolicySpec(5, segment_size=0.5, eps=1e-4)
    assert student.network.head == expected
    assert (student.substep_rule, student.conditioner.null(1)["labels"]) == ("ceil", 10)


def test_the_averaged_weights_of_a_training_checkpoint_are_taken():
    raw = torch.load(CHECKPOINTS / "gmdit" / "train_checkpoint.pth", weights_only=True)["state_dict"]
    files = read_official_files(CHECKPOINTS / "gmdit" / "train_checkpoint.pth")
    name = "proj_out_means.weight"
    assert torch.equal(files.weights[name], raw[f"diffusion_ema.denoising.{name}"].float())
    assert not torch.equal(files.weights[name], raw[f"diffusion.denoising.{name}"].float())


def change_files(files, **weights):
    return replace(files, weights={**files.weights, **weights})


def test_a_mixture_of_one_component_has_no_log_weights_to_speak_of():
    files = read_official_files(CHECKPOINTS / "gmdit")
    of_one = {
        f"proj_out_{part}.{kind}": files.weights[f"proj_out_{part}.{kind}"].unflatten(0, (4, 4, -1))[:, 0].flatten(0, 1)
        for part in ("means", "logweights")
        for kind in ("weight", "bias")
    }  # fmt: skip
    one, all_four = (build_class_student(f, 1000.0) for f in (change_files(files, **of_one), files))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.3]))
    with torch.no_grad():
        means, logweights, _ = one(*inputs, labels=torch.tensor([1, 10]))
        expected = all_four(*inputs, labels=torch.tensor([1, 10]))[0][:, :1]
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logweights, torch.zeros(2, 1, 1, 8, 8))


def test_a_log_std_that_was_fixed_before_training_is_kept():
    files = read_official_files(CHECKPOINTS / "gmdit")
    fixed = replace(files, config={**files.config, "constant_logstd": -2.5})
    with torch.no_grad():
        outputs = build_class_student(fixed, 1000.0)(
            torch.randn(2, 4, 8, 8), torch.ones(2), labels=torch.zeros(2, dtype=torch.int64)
        )
    torch.testing.assert_close(outputs[2].flatten(), torch.full((2,), -2.5))


def test_a_pickle_that_would_run_code_is_refused_and_says_why(tmp_path):
    class Odd:
        def __reduce__(self):
            return print, ("code runs",)

    torch.save({"state_dict": {"a": Odd()}}, tmp_path / "odd.pth")
    config = write_config(tmp_path, "gmdit")
    with pytest.raises(CheckpointError, match=r"odd\.pth .*run code.*safetensors"):
        load_student(tmp_path / "odd.pth", config=config)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"segment and shift .*policy_config"):
        load_student(CHECKPOINTS / "dxdit" / "model.pth")
    with pytest.raises(CheckpointError, match=r"is an adapter \(GMFluxTransformer2DModel\).*--pipeline"):
        load_student(CHECKPOINTS / "gmflux" / "adapter")
    weights = load_file(CHECKPOINTS / "gmdit" / "diffusion_pytorch_model.safetensors")
    del weights["proj_out_logweights.weight"]
    write_config(tmp_path, "gmdit")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 'proj_out_logweights\.weight'"):
        load_official_student(str(tmp_path))


# Adapters on a base transformer


ADAPTERS = ["gmflux", "dxflux", "gmqwen", "dxqwen"]


def load_base(name):
    diffusers = pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
    kind = "FluxTransformer2DModel" if "flux" in name else "QwenImageTransformer2DModel"
    return getattr(diffusers, kind).from_pretrained(str(CHECKPOINTS / name / "base"))


def read_adapter(name, written="folder"):
    if written == "folder":
        return read_official_files(CHECKPOINTS / name / "adapter")
    files = read_official_files(
        CHECKPOINTS / name / "train_checkpoint.pth", CHECKPOINTS / name / "adapter" / "config.json"
    )
    return replace(files, policy=read_adapter(name).policy)


@pytest.mark.parametrize("written", ["folder", "training"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_recorded_outputs_log_std_too(name, written):
    from piflow_edge.distill.official.adapters import join_adapter

    network = join_adapter(read_adapter(name, written), load_base(name), SIZE)
    case = recorded(name)
    names = ("encoder_hidden_states", "pooled_projections", "guidance", "encoder_hidden_states_mask")
    conditioning = {key: torch.from_numpy(case[key]) for key in names if key in case}
    x_t, sigma = torch.from_numpy(case["hidden_states"]), torch.from_numpy(case["timestep"])
    with torch.no_grad():
        outputs = network(x_t, sigma, **conditioning)
    check_parts(case, network.head, outputs)


def test_an_adapter_says_its_policy():
    from piflow_edge.distill.official.output_layers import read_policy_spec

    assert read_policy_spec(read_adapter("gmflux"), 16, "proj_out") == GMPolicySpec(4, eps=1e-6)
    flux, qwen = (read_policy_spec(read_adapter(name), 16, "proj_out") for name in ("dxflux", "dxqwen"))
    assert flux == DXPolicySpec(5, segment_size=1 / 3.5, shift=3.2)
    assert qwen == DXPolicySpec(3, segment_size=1.0, shift=3.2, mode="polynomial")


def test_diffusers_own_names_of_a_dx_adapter_mean_the_same():
    from piflow_edge.distill.official.adapters import ADAPTERS, DXFluxNetwork, join_adapter

    files = replace(read_adapter("dxflux"), class_name="FluxTransformer2DModel")
    assert type(join_adapter(files, load_base("dxflux"), SIZE)) is DXFluxNetwork
    assert ADAPTERS["DXFluxTransformer2DModel"] == ADAPTERS["FluxTransformer2DModel"]


def test_an_adapter_of_another_base_is_refused():
    from piflow_edge.distill.official.adapters import join_adapter

    with pytest.raises(CheckpointError, match=r"for a FluxTransformer2DModel; the base is a QwenImage"):
        join_adapter(read_adapter("gmflux"), load_base("gmqwen"), SIZE)
    down = "transformer_blocks.0.ff.net.2.lora_A.weight"
    odd = change_files(read_adapter("gmflux"), **{down: torch.zeros(4, 7)})
    with pytest.raises(CheckpointError, match=r"LoRA for 'transformer_blocks\.0\.ff\.net\.2'.*another base"):
        join_adapter(odd, load_base("gmflux"), SIZE)


def make_flux2_adapter(base, K=3):
    """Random weights under the names and in the shapes of `GMFlux2Transformer2DModel`: no output layer but these."""
    torch.manual_seed(5)
    width, rank = base.inner_dim, 2
    shapes = {
        "proj_out_means": (K * 16, width), "proj_out_logweights": (K * 4, width),
        "proj_out_logstds.1": (6, width), "proj_out_logstds.3": (1, 6),
    }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape) / 4 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    weights["norm_out.linear.weight"] = torch.randn(2 * width, width) / 4
    for layer in ("transformer_blocks.0.ff.linear_out", "time_guidance_embed.timestep_embedder.linear_1"):
        rows, columns = base.get_submodule(layer).weight.shape
        weights |= {f"{layer}.lora_A.weight": torch.randn(rank, columns) / 4}
        weights |= {f"{layer}.lora_B.weight": torch.randn(rows, rank) / 4}
    return weights


def test_a_flux_2_adapter_is_the_base_with_its_own_layers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
    from piflow_edge.distill.official.adapters import GMFlux2Network, join_adapter

    torch.manual_seed(0)
    base = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    weights = make_flux2_adapter(base)
    save_file(
        weights, tmp_path / "diffusion_pytorch_model.safetensors", {"policy_config": '{"type": "GMFlow"}'}
    )
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "GMFlux2Transformer2DModel", "in_channels": 16})
    )
    x_t, sigma, text = torch.randn(2, *SIZE), torch.tensor([1.0, 0.4]), torch.randn(2, 5, 24)

    # By hand: the LoRA in the base's weights; tokens up to the output layer; then the layers of the adapter.
    network = join_adapter(read_official_files(tmp_path), base, SIZE)
    assert type(network) is GMFlux2Network and network.guidance_embedding == 4.0
    seen = {}
    base.norm_out.register_forward_hook(lambda module, given, made: seen.update(tokens=made, temb=given[1]))
    with torch.no_grad():
        means, logweights, logstds = network(x_t, sigma, encoder_hidden_states=text)
    layer = lambda name, v: torch.nn.functional.linear(v, weights[f"{name}.weight"], weights[f"{name}.bias"])  # noqa: E731
    packed = layer("proj_out_means", seen["tokens"]).view(
        2, 3, 4, 3, 4, 2, 2
    )  # (B, rows, columns, K, C, 2, 2)
    expected = packed.permute(0, 3, 4, 1, 5, 2, 6).reshape(2, 3, 4, 6, 8)
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=1e-5)
    packed = layer("proj_out_logweights", seen["tokens"]).view(2, 3, 4, 3, 2, 2)
    expected = packed.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 1, 6, 8).log_softmax(1)
    torch.testing.assert_close(logweights, expected, atol=1e-5, rtol=1e-5)
    silu = torch.nn.functional.silu
    expected = layer("proj_out_logstds.3", silu(layer("proj_out_logstds.1", silu(seen["temb"]))))
    torch.testing.assert_close(logstds.flatten(), expected.flatten(), atol=1e-5, rtol=1e-5)
