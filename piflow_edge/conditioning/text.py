"""Prompts: texts that a frozen encoder turns into what the network takes.

`TextPrompts` is the description that a bundle or a checkpoint holds. `TextPrompts.open` joins it with tokenizers and
with the encoders themselves, graphs of a bundle or modules of torch, and gives the conditioner that reads prompts.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from piflow_edge.errors import ConditioningError

from .arrays import ArrayConditioner, specs_from_json
from .base import ConditionRequest, ReadAsset, RunNetwork, convert_arrays, refuse_others, repeat, require_keys
from .mapping import Conditioning
from .specs import TensorSpec
from .tokenizer import PromptTokenizer, Tokens, check_prompt

log = logging.getLogger(__name__)

# Prompts whose encodings are kept. An encoding of T5-XXL takes 8 MB.
_KEPT_PROMPTS = 32
_MOST_TOKENS = 1 << 16


@dataclass(frozen=True)
class TextEncoderSpec:
    """One text encoder: what goes in, what of its outputs is used.

    Args:
        name: of the encoder; its graph is the network `encoder.NAME`, its tokenizer the asset `tokenizer.NAME.json`.
        max_tokens: longest prompt in tokens, template and special tokens included; the rest is cut off.
        template: text around the prompt, which stands for "{}".
        pad_to_max: the encoder is fed `max_tokens` ids, filled up with `pad_id`, however short the prompt.
        pad_id, pad_left: the padding, and whether it stands before the prompt.
        sees_padding: the encoder is fed a mask of ones: it attends to padding as FLUX's T5 does.
        drop_tokens: tokens at the front, of a template, that are not handed on.
        hidden_input: the network's input that the hidden states (B, T, D) go to, or None.
        mask_input: the network's input that the mask (B, T) goes to, or None; hidden states of padding are
            then 0.
        pooled_input: the network's input that the pooled vectors (B, P) go to, or None.
        fixed_length: hand on `max_tokens - drop_tokens` hidden states, filled up with 0; else as many as the longest
            prompt of a call has.
        layers: which hidden states they are, counted as transformers does, () for the last; several are joined along D.
            The encoder's graph has it built in; here it is for the record and for training.
    """

    name: str
    max_tokens: int
    template: str = "{}"
    pad_to_max: bool = False
    pad_id: int = 0
    pad_left: bool = False
    sees_padding: bool = False
    drop_tokens: int = 0
    hidden_input: str | None = "encoder_hidden_states"
    mask_input: str | None = "encoder_attention_mask"
    pooled_input: str | None = "pooled_projections"
    fixed_length: bool = True
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))  # JSON has lists
        if not re.fullmatch(r"[\w-]{1,40}", self.name, re.ASCII):
            raise ConditioningError(
                f"an encoder's name is up to 40 letters and digits; got {self.name!r:.60}"
            )
        if self.template.count("{}") != 1:
            raise ConditioningError(
                f"a template holds one {{}}, where the prompt goes; got {self.template!r}"
            )
        if not 0 <= self.drop_tokens < self.max_tokens <= _MOST_TOKENS:
            raise ConditioningError(
                f"drop_tokens lies below max_tokens, which is up to {_MOST_TOKENS}; got {self.drop_tokens} and "
                f"{self.max_tokens}"
            )

    @property
    def tokenizer_asset(self) -> str:
        """Name of the bundle's asset that holds the tokenizer."""
        return f"tokenizer.{self.name}.json"

    def build_tokenizer(self, file: bytes) -> PromptTokenizer:
        """Return the tokenizer in the bytes of a `tokenizer.json`, with these settings."""
        names = ("template", "max_tokens", "pad_to_max", "pad_id", "pad_left")
        return PromptTokenizer(file, **{name: getattr(self, name) for name in names})

    @property
    def network(self) -> str:
        """Name of the bundle's network that is the encoder.

        It takes `input_ids` and `attention_mask`, int64 (B, T), and gives `hidden_states` (B, T, D), `pooled` (B, P).
        """
        return f"encoder.{self.name}"

    def encoder_inputs(self, tokens: Tokens) -> dict[str, np.ndarray]:
        """Return what the encoder is fed for one prompt, a batch of one."""
        mask = np.ones_like(tokens.mask) if self.sees_padding else tokens.mask
        return {"input_ids": tokens.ids[None], "attention_mask": mask[None]}

    def encode(self, tokens: Tokens, run_network: RunNetwork) -> dict[str, np.ndarray]:
        """Run the encoder on one prompt and return what it feeds the network, a batch of one."""
        found = run_network(self.network, self.encoder_inputs(tokens))
        fed: dict[str, np.ndarray] = {}
        mask = tokens.mask[None, self.drop_tokens :]
        length = self.max_tokens - self.drop_tokens if self.fixed_length else mask.shape[1]
        missing = ((0, 0), (0, length - mask.shape[1]))
        if self.hidden_input is not None:
            hidden = np.asarray(found["hidden_states"], np.float32)[:, self.drop_tokens :]
            if self.mask_input is not None:
                hidden = np.where(mask[..., None] > 0, hidden, np.float32(0))
            fed[self.hidden_input] = np.pad(hidden, (*missing, (0, 0)))
        if self.mask_input is not None:
            fed[self.mask_input] = np.pad(mask, missing)
        if self.pooled_input is not None:
            fed[self.pooled_input] = np.asarray(found["pooled"], np.float32)
        return fed


@dataclass(frozen=True)
class TextPrompts(ArrayConditioner):
    """Steers by prompts. `encoders`: one or several. `inputs`: what they feed the network, together.

    `null_prompt`: the prompt that guidance takes for "no condition"; None where the model was trained with none.
    `examples`: prompts to try the model with.
    """

    encoders: tuple[TextEncoderSpec, ...]
    inputs: tuple[TensorSpec, ...]
    null_prompt: str | None = ""
    examples: tuple[str, ...] = ("a red apple",)

    kind: ClassVar[str] = "text"
    positional: ClassVar[str] = "prompts"

    def __post_init__(self):
        for name in ("encoders", "inputs", "examples"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.encoders or not self.examples:
            raise ConditioningError("text needs one encoder and one example or more")
        for prompt in (*self.examples, self.null_prompt or ""):
            check_prompt(prompt)
        fed = [name for encoder in self.encoders
               for name in (encoder.hidden_input, encoder.mask_input, encoder.pooled_input) if name]  # fmt: skip
        if sorted(fed) != sorted(spec.name for spec in self.inputs):
            raise ConditioningError(
                f"the encoders feed {', '.join(fed)}, the network takes {'; '.join(map(str, self.inputs))}"
            )

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(encoder.network for encoder in self.encoders)

    def open(self, read_asset: ReadAsset, run_network: RunNetwork) -> "OpenedTextPrompts":
        """Return the conditioner that reads prompts, with the tokenizers and encoders of `encoders`."""
        return OpenedTextPrompts(self, read_asset, run_network)

    def encode(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """Check `asked.arrays`, encodings made elsewhere; prompts need the encoders, see `open`."""
        refuse_others(self, request, "prompts", "arrays")
        if request.arrays is None:
            raise ConditioningError(
                f"the bundle has no text encoders; give arrays: {'; '.join(map(str, self.inputs))}"
            )
        return repeat(convert_arrays(self, request.arrays), request.count)

    def title(self, description: dict[str, Any]) -> str:
        return description["prompt"] if "prompt" in description else super().title(description)

    def summarize(self) -> str:
        shown = ", ".join(map(repr, self.examples[:3]))
        return f"a prompt steers each image, such as {shown}"

    def to_json(self) -> dict[str, Any]:
        inputs = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in self.inputs]
        encoders = [{**asdict(spec), "layers": list(spec.layers)} for spec in self.encoders]
        return {
            "kind": self.kind,
            "encoders": encoders,
            "inputs": inputs,
            "null_prompt": self.null_prompt,
            "examples": list(self.examples),
        }

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "TextPrompts":
        require_keys(cls.kind, body, "encoders", "inputs", "null_prompt", "examples")
        examples, null_prompt = body["examples"], body["null_prompt"]
        if not isinstance(examples, list) or not isinstance(body["encoders"], list):
            raise ConditioningError("conditioning of kind 'text' holds lists of encoders and of examples")
        return cls(
            tuple(map(_encoder_from_json, body["encoders"])),
            specs_from_json(cls.kind, body["inputs"]),
            null_prompt,
            tuple(examples),
        )


class OpenedTextPrompts(TextPrompts):
    """`TextPrompts` with its tokenizers and encoders at hand. Threads may share it.

    Every prompt is encoded alone, so that its image does not depend on what else is in the batch. Encodings of the last
    prompts are kept.
    """

    def __init__(self, spec: TextPrompts, read_asset: ReadAsset, run_network: RunNetwork):
        super().__init__(**{each.name: getattr(spec, each.name) for each in fields(spec)})
        self.spec, self._run = spec, run_network
        self._tokenizers = {e.name: e.build_tokenizer(read_asset(e.tokenizer_asset)) for e in spec.encoders}
        self._encodings: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()  # each a batch of one
        self._lock = Lock()

    def encode(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """Encode `asked.prompts`, a text or a list of texts; or check `asked.arrays`, encodings made elsewhere."""
        refuse_others(self, request, "prompts", "arrays")
        if (request.prompts is None) == (request.arrays is None):
            raise ConditioningError(f"give prompts, one per image; {self.summarize()}")
        if request.arrays is not None:
            return repeat(convert_arrays(self, request.arrays), request.count)
        return repeat(self._encode_all(list_prompts(request.prompts)), request.count)

    def example_prompts(self, count: int) -> list[str]:
        examples = self.examples
        return [examples[i % len(examples)] for i in range(count)]

    def trace(self, request: ConditionRequest) -> dict[str, np.ndarray]:
        """The ids of every prompt for every encoder, int64 (B, T), shorter ones filled up with -1."""
        prompts = list_prompts(request.prompts)
        traced = {}
        for name, tokenizer in self._tokenizers.items():
            ids = [tokenizer.encode(prompt).ids for prompt in prompts]
            longest = max(map(len, ids))
            filled = [np.pad(one, (0, longest - len(one)), constant_values=-1) for one in ids]
            traced[f"ids.{name}"] = np.stack(filled)
        return traced

    def tokenize(self, prompt: str) -> dict[str, Tokens]:
        """Return a prompt's tokens for every encoder, by its name."""
        return {name: tokenizer.encode(prompt) for name, tokenizer in self._tokenizers.items()}

    def null(self, count: int) -> dict[str, np.ndarray] | None:
        prompt = self.null_prompt
        return None if prompt is None else repeat(self._encode_all([prompt]), count)

    def example(self, count: int) -> dict[str, np.ndarray]:
        return self._encode_all(self.example_prompts(count))

    def describe(self, request: ConditionRequest, conditioning: Conditioning) -> list[dict[str, Any]]:
        """The prompt of every image; of arrays made elsewhere, their SHA-256."""
        if request.prompts is None:
            return super().describe(request, conditioning)
        return [
            {"prompt": prompt} for prompt in list_prompts(request.prompts) for _ in range(request.count or 1)
        ]

    def recall(self, descriptions: Sequence[dict[str, Any]], request: ConditionRequest) -> ConditionRequest:
        if any("sha256" in description for description in descriptions):
            return super().recall(descriptions, request)
        if request != ConditionRequest():
            raise ConditioningError("the description holds the prompts; give nothing else")
        prompts = [description.get("prompt") for description in descriptions]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ConditioningError(f"a description holds one prompt; got {descriptions[0]!r} and so on")
        return ConditionRequest(prompts=prompts)

    def _encode_all(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        found = self._find_known(prompts)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        tokens = {prompt: self.tokenize(prompt) for prompt in missing}
        fed: dict[str, dict[str, np.ndarray]] = {prompt: {} for prompt in missing}
        # Encoder by encoder: where one network is open at a time, each is opened once.
        for spec in self.encoders:
            for prompt in missing:
                fed[prompt] |= spec.encode(tokens[prompt][spec.name], self._run)
        for prompt in missing:
            self._warn_of_cuts(tokens[prompt])
            found[prompt] = convert_arrays(self, fed[prompt])
        self._keep({prompt: found[prompt] for prompt in missing})
        return join_encodings([found[prompt] for prompt in prompts], self.inputs)

    def _find_known(self, prompts: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        with self._lock:
            found = {prompt: self._encodings[prompt] for prompt in prompts if prompt in self._encodings}
            for prompt in found:
                self._encodings.move_to_end(prompt)
        return found

    def _keep(self, encodings: Mapping[str, dict[str, np.ndarray]]) -> None:
        """Keep encodings, each a batch of one, for the next who asks."""
        with self._lock:
            self._encodings.update(encodings)
            while len(self._encodings) > _KEPT_PROMPTS:
                self._encodings.popitem(last=False)

    def _warn_of_cuts(self, tokens: Mapping[str, Tokens]) -> None:
        for spec in self.encoders:
            if cut := tokens[spec.name].cut:
                log.warning(
                    "encoder %r reads %d tokens; the end of a prompt is cut off: %.200r",
                    spec.name, spec.max_tokens, cut,
                )  # fmt: skip


def list_prompts(prompts: Any) -> list[str]:
    """Return one prompt, or several, as a list.

    Raises:
        ConditioningError: none, or something that is no text.
    """
    listed: list[Any] = (
        [prompts] if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence) else list(prompts)
    )
    if not listed:
        raise ConditioningError("give one prompt or more; got none")
    for prompt in listed:
        check_prompt(prompt)
    return listed


def join_encodings(
    parts: Sequence[Mapping[str, np.ndarray]], inputs: Sequence[TensorSpec]
) -> dict[str, np.ndarray]:
    """Return encodings of several prompts as one batch.

    Shorter ones are filled up with 0 along named axes, such as tokens; their masks show it.
    """
    joined = {}
    for spec in inputs:
        arrays = [part[spec.name] for part in parts]
        longest = np.max([array.shape for array in arrays], axis=0)
        # Never along the batch: each part has one entry there.
        joined[spec.name] = np.concatenate(
            [np.pad(array, [(0, more) for more in longest - array.shape]) for array in arrays]
        )
    return joined


def _encoder_from_json(body: Any) -> TextEncoderSpec:
    names = {field.name: field for field in fields(TextEncoderSpec)}
    if not isinstance(body, dict) or set(body) != set(names):
        got = sorted(body) if isinstance(body, dict) else body
        raise ConditioningError(f"a text encoder holds {', '.join(names)}; got {got!r}")
    for name, value in body.items():
        if not _JSON_KINDS[names[name].type](value):
            raise ConditioningError(f"a text encoder has an unusable {name}: {value!r:.60}")
    return TextEncoderSpec(**body)


# What a value in JSON must be, by the annotation of the field it fills; what is in range, `TextEncoderSpec` checks.
_JSON_KINDS: dict[Any, Callable[[Any], bool]] = {
    str: lambda value: type(value) is str,
    int: lambda value: type(value) is int and 0 <= value < 2**31,
    bool: lambda value: type(value) is bool,
    str | None: lambda value: value is None or (type(value) is str and value != ""),
    tuple[int, ...]: lambda value: isinstance(value, list) and all(type(layer) is int for layer in value),
}
