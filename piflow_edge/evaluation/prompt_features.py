"""Images and prompts as vectors of one space: two networks that were trained to bring those together, such as CLIP.

The image's network is an .onnx file as for `--features`. The prompt's is one too, and takes either `input_ids` (B, T),
perhaps with `attention_mask`, of the `tokenizer.json` beside it; or what steers the students, by their inputs' names,
as `train-features` writes it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from piflow_edge.conditioning import Conditioning, take
from piflow_edge.conditioning.tokenizer import PromptTokenizer
from piflow_edge.errors import FeatureError
from piflow_edge.system.files import sha256
from piflow_edge.system.pixels import DESCRIPTION_KEY

from .features import OnnxFeatures, open_feature_file

# Prompts that share a network call.
_BATCH_SIZE = 64
# Longest prompt where the network takes any; of CLIP.
_MAX_TOKENS = 77
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
           "tensor(int32)": np.int32}  # fmt: skip


class PromptFeatures:
    """Compares images with prompts.

    Args:
        images: .onnx file of the image's network; see `OnnxFeatures`.
        prompts: .onnx file of the prompt's network.
        value_range: of the first; see `OnnxFeatures`.

    Raises:
        FeatureError: one of the files cannot be used.
        MissingExtraError: onnxruntime is not installed, or `tokenizers` where it is needed.
    """

    def __init__(self, images: Path, prompts: Path, *, value_range: str | None = None):
        self.images = OnnxFeatures(images, value_range=value_range)
        self._file = prompts
        self._session, graph = open_feature_file(prompts)
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._output = _find_output(self._session, prompts)
        self._tokenizer = self._read_tokenizer() if "input_ids" in self._inputs else None
        own = self._session.get_modelmeta().custom_metadata_map.get(DESCRIPTION_KEY)
        self.description = own or f"{images.name} and {prompts.name}"
        self.source = {
            "images": self.images.source,
            "prompts": {"file": prompts.name, "sha256": sha256(graph.model)},
        }

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Return vectors of length 1, (M, D), of images float32 (M, C, H, W) in [-1, 1]."""
        return _normalise(self.images(images))

    def encode_prompts(self, prompts: Sequence[str], conditioning: Conditioning) -> np.ndarray:
        """Return vectors of length 1, (M, D), of prompts.

        Args:
            prompts: texts.
            conditioning: what steers images of these prompts, for a network that takes that.

        Raises:
            FeatureError: the network takes other inputs, or fails.
        """
        found = []
        for start in range(0, len(prompts), _BATCH_SIZE):
            some = slice(start, start + _BATCH_SIZE)
            found += self._run(list(prompts[some]), take(conditioning, some))
        return _normalise(np.concatenate(found))

    def _run(self, prompts: list[str], conditioning: Conditioning) -> list[np.ndarray]:
        if self._tokenizer is not None:  # one by one: each as long as it is
            return [self._call(self._read_prompt(prompt)) for prompt in prompts]
        if missing := self._inputs.keys() - conditioning.keys():
            raise FeatureError(
                f"{self._file.name} takes {min(missing)!r}; what steers these images is "
                f"{', '.join(conditioning) or 'nothing'}, or put the network's tokenizer.json beside it"
            )
        return [self._call({name: np.asarray(conditioning[name]) for name in self._inputs})]

    def _read_prompt(self, prompt: str) -> dict[str, np.ndarray]:
        assert self._tokenizer is not None
        tokens = self._tokenizer.encode(prompt)
        given = {"input_ids": tokens.ids[None], "attention_mask": tokens.mask[None]}
        if unknown := self._inputs.keys() - given.keys():
            raise FeatureError(f"{self._file.name} takes {min(unknown)!r}, which no tokenizer gives")
        return {name: given[name] for name in self._inputs}

    def _call(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        given = {
            name: array.astype(_DTYPES.get(self._inputs[name].type, array.dtype))
            for name, array in inputs.items()
        }
        try:
            (found,) = self._session.run([self._output], given)
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise FeatureError(f"{self._file.name} failed: {error}") from error
        if found.ndim != 2:
            raise FeatureError(
                f"a prompt is one vector, (B, D); {self._file.name} gives {found.shape} in {self._output!r}"
            )
        return found.astype(np.float32)

    def _read_tokenizer(self) -> PromptTokenizer:
        file = self._file.parent / "tokenizer.json"
        if not file.is_file():
            raise FeatureError(f"{self._file.name} takes input_ids; put its tokenizer.json beside it")
        body, length = file.read_bytes(), self._inputs["input_ids"].shape[-1]
        fixed = isinstance(length, int)
        try:
            padding = json.loads(body).get("padding") or {}
        except ValueError as error:
            raise FeatureError(f"{file} is no tokenizer: {error}") from error
        return PromptTokenizer(
            body,
            max_tokens=length if fixed else _MAX_TOKENS,
            pad_to_max=fixed,
            pad_id=padding.get("pad_id", 0),
        )


def _find_output(session, file: Path) -> str:
    names = [output.name for output in session.get_outputs()]
    known = [name for name in ("features", "text_embeds") if name in names]
    if len(names) > 1 and not known:
        raise FeatureError(
            f"which output of {file.name} is the prompt's vector? It has {', '.join(names)}; name one 'features'"
        )
    return known[0] if known else names[0]


def _normalise(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
