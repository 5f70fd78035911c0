"""Pipelines of diffusers with random weights, and adapters for them, in the files that real ones have."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.text_encoders import tiny_text_encoder, transformers_tokenizer

_SMALL = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
_TEXT = {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32}
K = 3


def save_flux_pipeline(folder: Path) -> Path:
    """A FLUX.1 pipeline of some ten thousand weights; images of twice the latents' size."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        **_SMALL, **_TEXT, in_channels=16, num_single_layers=1, pooled_projection_dim=32, guidance_embeds=True
    )
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    clip, t5 = tiny_text_encoder("clip").module.model, tiny_text_encoder("t5").module.model
    words = transformers_tokenizer("clip")
    words.model_max_length = 20
    pipeline = diffusers.FluxPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae, clip, words, t5, transformers_tokenizer("unigram"), transformer,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def save_gm_adapter(
    folder: Path, transformer, class_name: str, lora: tuple[str, ...], *, bias: bool = True
) -> Path:
    """A GM adapter with random weights for a transformer, under the authors' names."""
    torch.manual_seed(7)
    width, channels = transformer.inner_dim, transformer.config.in_channels
    shapes = {
        "proj_out_means": (K * channels, width), "proj_out_logweights": (K * 4, width),
        "proj_out_logstds.1": (6, width), "proj_out_logstds.3": (1, 6),
    }  # fmt: skip
    weights = {f"{name}.weight": torch.randn(shape) / 8 for name, shape in shapes.items()}
    weights |= {f"{name}.bias": torch.randn(shape[0]) / 8 for name, shape in shapes.items()}
    for kind in ("weight", "bias") if bias else ("weight",):
        own = getattr(transformer.norm_out.linear, kind)
        weights[f"norm_out.linear.{kind}"] = torch.randn_like(own) / 8
    for layer in lora:
        rows, columns = transformer.get_submodule(layer).weight.shape
        weights[f"{layer}.lora_A.weight"] = torch.randn(2, columns) / 8
        weights[f"{layer}.lora_B.weight"] = torch.randn(rows, 2) / 8
    folder.mkdir(parents=True)
    save_file(
        weights, folder / "diffusion_pytorch_model.safetensors", {"policy_config": '{"type": "GMFlow"}'}
    )
    config = {
        "_class_name": class_name, "num_gaussians": K, "constant_logstd": None, "logstd_inner_dim": 6,
        "gm_num_logstd_layers": 2, "logweights_channels": 4, "in_channels": channels,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_qwen_pipeline(folder: Path) -> Path:
    """A Qwen-Image pipeline of some ten thousand weights; images of twice the latents' size."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(**_SMALL, **_TEXT, in_channels=16, out_channels=4)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 2.0, 1.1],
    )  # fmt: skip
    text = tiny_text_encoder("qwen2_5_vl").module.model
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(_qwen_config(text))
    encoder.model.language_model.load_state_dict(text.state_dict())
    words = transformers_tokenizer("qwen")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    diffusers.QwenImagePipeline(scheduler, vae, encoder, words, transformer).save_pretrained(folder)
    return folder


def _qwen_config(text):
    import transformers

    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    return transformers.Qwen2_5_VLConfig(text_config=text.config.to_dict(), vision_config=vision)


# Which hidden states of the tiny encoder are joined; of the real one 10, 20 and 30.
FLUX_2_LAYERS = (0, 1, 2)
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
)


def save_flux_2_pipeline(folder: Path) -> Path:
    """A FLUX.2 pipeline of some ten thousand weights; images of twice the latents' size."""
    import copy

    import diffusers
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        **_SMALL, in_channels=16, num_single_layers=1, joint_attention_dim=3 * 32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    words = copy.deepcopy(transformers_tokenizer("qwen"))
    words.chat_template, words.padding_side, words.pad_token = _CHAT, "left", "<|endoftext|>"
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "head_dim": 16}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(
            **small, vocab_size=len(words), num_hidden_layers=3, num_key_value_heads=1
        ),
        vision_config=transformers.PixtralVisionConfig(
            **small, num_hidden_layers=1, image_size=28, patch_size=14
        ),
    )
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    diffusers.Flux2Pipeline(scheduler, vae, encoder, words, transformer).save_pretrained(folder)
    return folder
