"""What a pipeline does around its transformer: `FAMILIES` is the one registry of the classes that are known.

To add one, write a `PipelineFamily` and a line in `FAMILIES`; its transformer has a line in
`distill/networks/diffusers_networks.py`, its adapter in `distill/official/adapters.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EncoderPlace:
    """One text encoder of a pipeline.

    Args:
        folder, tokenizer: subfolders of the pipeline.
        name: of the encoder in the bundle.
        settings: fields of `TextEncoderSpec`, as the pipeline's own code has them.
        system: what the pipeline tells a chat model before the prompt; the tokenizer's own template puts both together.
    """

    folder: str
    tokenizer: str
    name: str
    settings: Mapping[str, Any]
    system: str | None = None


@dataclass(frozen=True)
class PipelineFamily:
    """One class of pipelines.

    Args:
        transformer: diffusers' class of the transformer.
        encoders: in the order in which they are read.
        size: height and width of images where the user does not say.
        examples: prompts that go into the bundle, to try it with.
    """

    transformer: str
    encoders: tuple[EncoderPlace, ...]
    size: tuple[int, int] = (1024, 1024)
    examples: tuple[str, ...] = field(default=("a red apple on a wooden table", "a cat wearing a hat"))


# Source of these settings: `encode_prompt` of the pipelines in diffusers 0.36 to 0.42.
_FLUX = PipelineFamily(
    "FluxTransformer2DModel",
    (
        EncoderPlace(
            "text_encoder", "tokenizer", "clip",
            {"hidden_input": None, "mask_input": None, "pooled_input": "pooled_projections"},
        ),
        EncoderPlace(
            "text_encoder_2", "tokenizer_2", "t5",
            {"mask_input": None, "pooled_input": None, "max_tokens": 512, "pad_to_max": True, "sees_padding": True},
        ),
    ),
)  # fmt: skip

_QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# Tokens of the template before the prompt, by the tokenizer of Qwen2.5-VL.
_QWEN_DROPS = 34
_QWEN = PipelineFamily(
    "QwenImageTransformer2DModel",
    (
        EncoderPlace(
            "text_encoder", "tokenizer", "qwen2_5_vl",
            {"template": _QWEN_TEMPLATE, "drop_tokens": _QWEN_DROPS, "max_tokens": 512 + _QWEN_DROPS,
             "mask_input": "encoder_hidden_states_mask", "pooled_input": None, "fixed_length": False},
        ),
    ),
)  # fmt: skip

# Prompts are filled up to 512 tokens and the padding is handed on unmasked, as FLUX.2 was trained.
_FLUX_2_SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
_FLUX_2 = PipelineFamily(
    "Flux2Transformer2DModel",
    (
        EncoderPlace(
            "text_encoder", "tokenizer", "mistral3",
            {"mask_input": None, "pooled_input": None, "max_tokens": 512, "pad_to_max": True, "fixed_length": True,
             "layers": (10, 20, 30)},
            system=_FLUX_2_SYSTEM,
        ),
    ),
)  # fmt: skip

FAMILIES: dict[str, PipelineFamily] = {
    "FluxPipeline": _FLUX,
    "Flux2Pipeline": _FLUX_2,
    "QwenImagePipeline": _QWEN,
    # As the authors' own code saves them.
    "PiFluxPipeline": _FLUX,
    "PiFlux2Pipeline": _FLUX_2,
    "PiQwenImagePipeline": _QWEN,
}
