"""A LoRA of the user's own on top of a student: the same function as with peft, at any strength, and off again."""

import pytest

pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
pytest.importorskip("peft", reason="needs the 'diffusers' extra")

import diffusers
import torch
from safetensors.torch import save_file

from piflow_edge.distill.official.user_lora import UserLoRA, add_user_lora
from piflow_edge.errors import CheckpointError
from tests.helpers.golden_cases import GOLDEN

BASE = GOLDEN / "checkpoints" / "gmflux" / "base"
LAYERS = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out")


def load_base():
    return diffusers.FluxTransformer2DModel.from_pretrained(BASE)


@pytest.fixture
def lora():
    """Random pairs of rank 3 by diffusers' names."""
    torch.manual_seed(0)
    base, found = load_base(), {}
    for layer in LAYERS:
        rows, columns = base.get_submodule(layer).weight.shape
        found[f"transformer.{layer}.lora_A.weight"] = torch.randn(3, columns) / 4
        found[f"transformer.{layer}.lora_B.weight"] = torch.randn(rows, 3) / 4
    return found


def run(module):
    torch.manual_seed(1)
    ids = torch.zeros(6, 3)
    with torch.no_grad():
        return module(
            torch.randn(1, 4, 16), timestep=torch.tensor([0.7]), guidance=torch.tensor([3.5]),
            encoder_hidden_states=torch.randn(1, 2, 24), pooled_projections=torch.randn(1, 20),
            img_ids=ids[:4], txt_ids=ids[:2], return_dict=False,
        )[0]  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_it_is_the_same_function_as_with_peft(lora, tmp_path, strength):
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    ours, theirs = load_base(), load_base()
    add_user_lora(ours, UserLoRA(str(tmp_path), strength))
    theirs.load_lora_adapter(dict(lora), prefix="transformer")
    theirs.set_adapters([next(iter(theirs.peft_config))], [strength])
    torch.testing.assert_close(run(ours), run(theirs), atol=2e-5, rtol=1e-5)
    assert (run(ours) - run(load_base())).abs().max() > 0.01


def test_an_alpha_scales_it(lora, tmp_path):
    scaled = {name: v * 2 if ".lora_B." in name else v for name, v in lora.items()}
    alphas = {f"transformer.{layer}.alpha": torch.tensor(6.0) for layer in LAYERS}  # twice the rank
    save_file(scaled, tmp_path / "scaled.safetensors")
    save_file(lora | alphas, tmp_path / "alpha.safetensors")
    one, other = load_base(), load_base()
    add_user_lora(one, UserLoRA(str(tmp_path / "scaled.safetensors")))
    add_user_lora(other, UserLoRA(str(tmp_path / "alpha.safetensors")))
    torch.testing.assert_close(run(one), run(other), atol=1e-5, rtol=1e-5)


def test_what_is_no_lora_for_this_network_is_refused(lora, tmp_path):
    save_file(
        {"lora_unet_double_blocks_0.lora_down.weight": torch.ones(2, 2)}, tmp_path / "kohya.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"by diffusers' names .*'lora_unet_double_blocks_0"):
        add_user_lora(load_base(), UserLoRA(str(tmp_path / "kohya.safetensors")))
    odd = {name.replace("transformer_blocks.0", "transformer_blocks.7"): v for name, v in lora.items()}
    save_file(odd, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.7.* no such layer"):
        add_user_lora(load_base(), UserLoRA(str(tmp_path / "other.safetensors")))
    with pytest.raises(CheckpointError, match="2 safetensors files"):
        add_user_lora(load_base(), UserLoRA(str(tmp_path)))
