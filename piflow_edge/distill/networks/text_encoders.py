"""Frozen text encoders of `transformers`: what turns a prompt into the arrays that steer a network.

The same object serves training, where it encodes captions, and export, where its module becomes a graph.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.conditioning import Conditioner, OpenedTextPrompts, TensorSpec, TextEncoderSpec, TextPrompts
from piflow_edge.distill.official.hub import check_on_hub, check_there, explain_failure
from piflow_edge.distill.stored_weights import find_stored_type, leave_in_files, read_weights
from piflow_edge.errors import CheckpointError, MissingExtraError

# Longest prompt where neither the caller nor the model says less.
_MAX_TOKENS = 512


@dataclass(frozen=True)
class EncoderFamily:
    """One architecture of text encoders. To add one, add a line to `FAMILIES`.

    Args:
        model_class: name of its class in `transformers`.
        pool: `(outputs, mask (B, T)) -> pooled (B, P)`; None where there are no pooled vectors.
        text_model: name of the attribute that is the text's part of a larger model, or None.
        defaults: what its published pipelines do, as fields of `TextEncoderSpec`.
    """

    model_class: str
    pool: Callable[[Any, Tensor], Tensor] | None = None
    text_model: str | None = None
    defaults: Mapping[str, Any] | None = None


def pool_mean(outputs: Any, mask: Tensor) -> Tensor:
    """Mean of the last hidden states over a prompt's tokens, as sentence encoders are trained."""
    weights = mask[..., None].to(outputs.last_hidden_state.dtype)
    return (outputs.last_hidden_state * weights).sum(1) / weights.sum(1).clamp(min=1e-6)


def pool_first(outputs: Any, mask: Tensor) -> Tensor:
    """The last hidden state of the first token."""
    return outputs.last_hidden_state[:, 0]


def pool_own(outputs: Any, mask: Tensor) -> Tensor:
    """What the model itself pools; of CLIP, the state at the end of the text."""
    return outputs.pooler_output


_DECODER = {"pooled_input": None, "fixed_length": False}
FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily("BertModel", pool_mean),
    "distilbert": EncoderFamily("DistilBertModel", pool_mean),
    "mpnet": EncoderFamily("MPNetModel", pool_mean),
    "clip": EncoderFamily("CLIPTextModel", pool_own, defaults={"pad_to_max": True, "sees_padding": True}),
    "clip_text_model": EncoderFamily(
        "CLIPTextModel", pool_own, defaults={"pad_to_max": True, "sees_padding": True}
    ),
    "t5": EncoderFamily("T5EncoderModel", defaults={"pooled_input": None}),
    "qwen2": EncoderFamily("Qwen2Model", defaults=_DECODER),
    "qwen3": EncoderFamily("Qwen3Model", defaults=_DECODER),
    "qwen2_5_vl": EncoderFamily("Qwen2_5_VLModel", text_model="language_model", defaults=_DECODER),
    "mistral3": EncoderFamily("Mistral3Model", text_model="language_model", defaults=_DECODER),
}


class EncoderModule(nn.Module):
    """`input_ids`, `attention_mask`, int64 (B, T) -> hidden states (B, T, D), and where it pools vectors (B, P)."""

    def __init__(self, model: nn.Module, layers: Sequence[int], pool: Callable | None):
        super().__init__()
        self.model, self.layers, self.pool = model, tuple(layers), pool

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what `forward` returns."""
        return ("hidden_states", "pooled") if self.pool else ("hidden_states",)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=bool(self.layers)
        )
        chosen = [found.hidden_states[layer] for layer in self.layers] or [found.last_hidden_state]
        hidden = torch.cat(chosen, dim=-1)
        return (hidden, self.pool(found, attention_mask)) if self.pool else (hidden,)


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer. `tokenizer`: bytes of its `tokenizer.json`."""

    spec: TextEncoderSpec
    tokenizer: bytes
    module: EncoderModule

    @torch.no_grad()
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode ids and masks, int64 (B, T) each."""
        device = next(self.module.parameters()).device
        given = (torch.from_numpy(inputs[name]).to(device) for name in ("input_ids", "attention_mask"))
        found = self.module(*given)
        return {
            name: value.float().cpu().numpy() for name, value in zip(self.module.outputs, found, strict=True)
        }

    def fingerprint(self) -> str:
        """SHA-256 of weights and tokenizer."""
        digest = hashlib.sha256(self.tokenizer)
        for name, tensor in read_weights(self.module):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it feeds a network, found by encoding a token: in a large encoder those of a whole prompt take long."""

        def run(_, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = self.run({name: np.ones_like(ids[:, :1]) for name, ids in inputs.items()})
            tokens = inputs["input_ids"].shape[1]
            return found | {"hidden_states": np.repeat(found["hidden_states"], tokens, axis=1)}

        found = self.spec.encode(self.spec.build_tokenizer(self.tokenizer).encode("a"), run)
        return tuple(
            TensorSpec(name, str(array.dtype), _shape_of(array, name == self.spec.pooled_input, self.spec))
            for name, array in found.items()
        )


def open_prompts(
    encoders: Sequence[TextEncoder],
    *,
    null_prompt: str | None = "",
    examples: Sequence[str] = ("a red apple",),
) -> OpenedTextPrompts:
    """Return the conditioner that reads prompts with these encoders, in PyTorch."""
    inputs = tuple(spec for encoder in encoders for spec in encoder.inputs())
    spec = TextPrompts(tuple(encoder.spec for encoder in encoders), inputs, null_prompt, tuple(examples))
    return open_encoders(spec, encoders)


def open_encoders(spec: TextPrompts, encoders: Sequence[TextEncoder]) -> OpenedTextPrompts:
    """Return the conditioner that `spec` describes, with these encoders of its names."""
    assets = {encoder.spec.tokenizer_asset: encoder.tokenizer for encoder in encoders}
    networks = {encoder.spec.network: encoder for encoder in encoders}
    return spec.open(assets.__getitem__, lambda name, inputs: networks[name].run(dict(inputs)))


def load_text_encoder(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    name: str | None = None,
    in_files: bool = False,
    **settings: Any,
) -> TextEncoder:
    """Load a text encoder of `transformers`, which encodes in float32.

    Args:
        source: its folder, or a hub id, which is downloaded.
        tokenizer: folder or hub id of the tokenizer; None is `source`.
        name: for the bundle; None is the architecture's.
        in_files: leave large weights of a local folder there, see `stored_weights`: less memory, and slower.
        settings: fields of `TextEncoderSpec` that are not what the architecture's pipelines do.

    Raises:
        CheckpointError: no text encoder, or one of an architecture that `FAMILIES` does not have.
        MissingExtraError: `transformers` is not installed, or `sentencepiece`, which its tokenizer needs.
    """
    check_there(str(source), may_be_bare=True)
    transformers = _transformers()
    _check_sentencepiece(Path(tokenizer or source))
    for place in dict.fromkeys((source, tokenizer or source)):
        check_on_hub(str(place), "a text encoder")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise CheckpointError(
                f"{source} is a {config.model_type!r}; text encoders that are known: {', '.join(FAMILIES)}"
            )
        # Eager attention: the fused one of T5 does not go into a graph.
        model = getattr(transformers, family.model_class).from_pretrained(
            source,
            dtype=find_stored_type(Path(source)) if in_files else torch.float32,
            attn_implementation="eager",
        )
        if in_files:
            leave_in_files(model)
        words = transformers.AutoTokenizer.from_pretrained(tokenizer or source)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise explain_failure(str(source), "a text encoder", error) from error
    pooling = _sentence_pooling(Path(source)) or family.pool
    family = replace(family, pool=pooling)
    return build_text_encoder(model, words, family, name or config.model_type, **settings)


def load_text_encoders(sources: Sequence[str | Path], conditioner: Conditioner | None) -> list[TextEncoder]:
    """Load the text encoders of a student, with the settings that it was trained with where they are known.

    Args:
        sources: see `load_text_encoder`, in the order of the conditioner's encoders.
        conditioner: the student's.

    Raises:
        CheckpointError: another number of encoders than the student has; or as `load_text_encoder`.
    """
    specs = getattr(conditioner, "encoders", ())
    if specs and len(specs) != len(sources):
        raise CheckpointError(f"the student has {len(specs)} text encoders; {len(sources)} are given")
    if not specs:
        return [load_text_encoder(source) for source in sources]
    return [load_text_encoder(source, **asdict(spec)) for source, spec in zip(sources, specs, strict=True)]


def build_text_encoder(
    model: nn.Module, tokenizer: Any, family: EncoderFamily, name: str, **settings: Any
) -> TextEncoder:
    """Return a model and a tokenizer of `transformers` as a text encoder; see `load_text_encoder`."""
    text_model = getattr(model, family.text_model) if family.text_model else model
    longest = min(
        getattr(tokenizer, "model_max_length", _MAX_TOKENS),
        getattr(text_model.config, "max_position_embeddings", None) or _MAX_TOKENS,
        _MAX_TOKENS,
    )
    own: dict[str, Any] = {
        "max_tokens": longest,
        "pad_id": tokenizer.pad_token_id or 0,
        "pad_left": tokenizer.padding_side == "left",
    }
    pooled: dict[str, Any] = {} if family.pool else {"pooled_input": None}
    spec = TextEncoderSpec(name, **own | pooled | dict(family.defaults or {}) | settings)
    module = EncoderModule(text_model.eval().requires_grad_(False), spec.layers, family.pool)
    return TextEncoder(spec, tokenizer_json(tokenizer), module)


def read_chat_template(source: str | Path, system: str) -> str:
    """Return the text that a chat model's tokenizer puts around a prompt, "{}", after a system's message.

    Special tokens that the tokenizer adds by itself are left out.

    Raises:
        CheckpointError: the tokenizer has no chat template, or one that leaves the prompt out.
    """
    words = _transformers().AutoTokenizer.from_pretrained(source)
    parts = {"system": system, "user": "{}"}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()]
    try:
        text = words.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
    except Exception as error:  # the template is a program of the tokenizer's maker
        raise CheckpointError(
            f"the tokenizer in {source} has no chat template that can be used: {error}"
        ) from error
    if text.count("{}") != 1:
        raise CheckpointError(f"the chat template of the tokenizer in {source} does not hold the prompt once")
    added = words("")["input_ids"]
    return text.removeprefix(words.decode(added)) if added else text


def tokenizer_json(tokenizer: Any) -> bytes:
    """Return a tokenizer of `transformers` as a `tokenizer.json`, slow and sentencepiece ones converted."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        backend = convert_slow_tokenizer(tokenizer)
    return backend.to_str().encode()


def _check_sentencepiece(folder: Path) -> None:
    """Raise MissingExtraError where a tokenizer has to be converted, and what that takes is not installed."""
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    needed = "tokenizer.json" not in names and any(name.endswith(".model") for name in names)
    if needed and find_spec("sentencepiece") is None:
        raise MissingExtraError(
            f"the tokenizer in {folder} is a sentencepiece model, which 'sentencepiece' converts; get it with: "
            "pip install 'piflow-edge[diffusers]'"
        )


def _sentence_pooling(folder: Path) -> Callable[[Any, Tensor], Tensor] | None:
    """How a sentence encoder says that it pools, in the files of sentence-transformers; None where it does not."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    pools = {"pooling_mode_mean_tokens": pool_mean, "pooling_mode_cls_token": pool_first}
    wanted = [
        name
        for name, on in json.loads(file.read_text()).items()
        if name.startswith("pooling_mode") and on is True
    ]
    if len(wanted) != 1 or wanted[0] not in pools:
        raise CheckpointError(f"{file} asks for {', '.join(wanted)}; one of {', '.join(pools)} is known")
    return pools[wanted[0]]


def _shape_of(array: np.ndarray, pooled: bool, spec: TextEncoderSpec) -> tuple[int | str, ...]:
    if pooled:
        return ("batch", array.shape[1])
    tokens = array.shape[1] if spec.fixed_length else "tokens"
    return ("batch", tokens, *array.shape[2:])


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "a text encoder needs 'transformers'; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    return transformers
