"""What images are compared in: a network's features, opened by what is given on the command line.

| `--features` | what |
|---|---|
| `digits` | the small classifier of 8x8 digits that ships with the package |
| `FILE.onnx` | any feature extractor as ONNX, run in ONNX Runtime; `train-features` makes one from your own data |
| `FILE.pth`, `.pt`, `.safetensors` | an Inception-v3: torchvision's weights, or FID's as pytorch-fid lays them out |
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from piflow_edge.engines import Graph, read_graph_file
from piflow_edge.engines.ort.importing import import_onnxruntime
from piflow_edge.engines.ort.sessions import give_weights
from piflow_edge.errors import DataError, EngineError, FeatureError, ShapeError
from piflow_edge.system.files import sha256
from piflow_edge.system.pixels import (
    DESCRIPTION_KEY,
    RANGE_KEY,
    VALUE_RANGES,
    resize_images,
    round_to_bytes,
    split_images,
)

DIGITS = "digits"
_DIGITS_FILE = Path(__file__).parents[1] / "assets" / "digits_features.onnx"

# Images that share a network call.
_BATCH_SIZE = 64


class Features(Protocol):
    """Images to vectors.

    `description`: one line for tables and reports. `source`: JSON of where it came from, such as a file's checksum.
    Called with float32 images (M, C, H, W) in [-1, 1], it returns floating-point features (M, D).
    """

    description: str
    source: dict

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


def open_features(
    spec: str,
    *,
    value_range: str | None = None,
    open_weights: Callable[[Path], Features] | None = None,
) -> Features:
    """Open the feature extractor that `spec` names; see the table above.

    Args:
        spec: "digits", or the path of a file.
        value_range: of an ONNX file's input, a key of `VALUE_RANGES`; None is what the file says, else "-1,1".
        open_weights: opens a file of an Inception's weights, which needs PyTorch; the commands hand in
            `InceptionFeatures`. None refuses such files.

    Raises:
        FeatureError: no such extractor; a file that cannot be used; a `value_range` for another kind.
        MissingExtraError: the package that runs it is not installed.
    """
    suffix = Path(spec).suffix.lower()
    if value_range is not None and suffix != ".onnx":
        raise FeatureError(f"only an ONNX file's range of values can be chosen; {spec!r} has its own")
    if suffix == ".onnx":
        return OnnxFeatures(Path(spec), value_range=value_range)
    if spec == DIGITS:
        return DigitFeatures()
    if suffix in (".pth", ".pt", ".safetensors") and open_weights is not None:
        return open_weights(Path(spec))
    raise FeatureError(
        f"features are 'digits', an .onnx file, or Inception-v3 weights as .pth, .pt or .safetensors; got {spec!r}"
    )


def choose_features(name: str, shape: tuple[int, ...]) -> Features:
    """Open the shipped classifier, for the digits.

    Args:
        name: of the data.
        shape: (C, H, W) of its images.

    Raises:
        DataError: other images; nothing is shipped for them.
    """
    if name != DIGITS or tuple(shape) != (1, 8, 8):
        raise DataError(
            f"features are shipped for 'digits' alone; for {name!r} give --features: Inception-v3 weights (.pth) "
            "for photographs, any extractor as .onnx, or one trained on these classes by: piflow-edge train-features"
        )
    return open_features(DIGITS)


def open_feature_file(path: Path) -> tuple[Any, Graph]:
    """Open a network that images or prompts are compared in, in ONNX Runtime on the CPU: its session, and its graph.

    Raises:
        FeatureError: it cannot be opened, or keeps weights anywhere but in files beside it.
        MissingExtraError: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    try:
        graph = read_graph_file(path)
    except EngineError as error:
        raise FeatureError(f"{path} is refused: {error}") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors reach the caller as exceptions; the rest is chatter
    give_weights(options, graph)
    try:
        session = ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes
        raise FeatureError(f"onnxruntime {ort.__version__} cannot open {path}: {error}") from error
    return session, graph


class OnnxFeatures:
    """A feature extractor in an ONNX file, run in ONNX Runtime on the CPU.

    Its one input takes images, float (B, C, H, W) with C 3 or 1; its output gives features (B, D) or (B, D, 1, 1), and
    is the only one or named "features". What it is fed: the images' 8-bit pixels, as a PNG would hold them; grey
    repeated to three channels where it takes three; resized to its H and W where these are fixed, bilinear with
    antialiasing; then scaled to `value_range`.

    Args:
        path: the file.
        value_range: a key of `VALUE_RANGES`; None is what `train-features` wrote into the file, else "-1,1".

    Raises:
        FeatureError: it cannot be opened, its input or output is something else, or it keeps weights anywhere but in
            files beside it.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, value_range: str | None = None):
        self._session, graph = open_feature_file(path)
        self._name = path.name
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._range = value_range or metadata.get(RANGE_KEY, "-1,1")
        if self._range not in VALUE_RANGES:
            raise FeatureError(f"a range of values is one of {', '.join(VALUE_RANGES)}; got {self._range!r}")
        self._read_input()
        self._read_output()
        if self._range in ("imagenet", "clip") and self._channels != 3:
            raise FeatureError(
                f"{self._range!r} normalises three channels; {self._name} takes {self._channels}"
            )
        self.description = metadata.get(DESCRIPTION_KEY, f"features of {self._name}")
        self.source = {"file": self._name, "sha256": sha256(graph.model), "value_range": self._range}

    def _read_input(self) -> None:
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        if len(shape) != 4 or shape[1] not in (1, 3) or inputs[0].type not in dtypes:
            found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise FeatureError(
                f"a feature extractor has one input, float (B, C, H, W) with C 3 or 1; {self._name} has {found}"
            )
        batch, self._channels, *size = shape
        self._input, self._dtype = inputs[0].name, dtypes[inputs[0].type]
        self._batch = batch if isinstance(batch, int) else None  # None: any
        self._size = tuple(n if isinstance(n, int) else None for n in size)

    def _read_output(self) -> None:
        names = [output.name for output in self._session.get_outputs()]
        known = [name for name in ("features", "image_embeds") if name in names]
        if len(names) > 1 and not known:
            raise FeatureError(
                f"which output of {self._name} are the features? It has {', '.join(names)}; name one 'features'"
            )
        self._output = known[0] if known else names[0]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (M, D) of images float32 (M, C, H, W) in [-1, 1].

        Raises:
            FeatureError: images of other channels, or features that are not one vector per image.
        """
        channels = images.shape[1]
        if channels != self._channels and (channels, self._channels) != (1, 3):
            raise FeatureError(f"{self._name} takes images of {self._channels} channels; got {channels}")
        return np.concatenate(
            [self._run(piece) for piece in split_images(images, self._batch or _BATCH_SIZE)]
        )

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """Bring images to the size, channels and range that the network takes."""
        pixels = resize_images(round_to_bytes(images), *self._size)
        if pixels.shape[1] != self._channels:
            pixels = pixels.repeat(self._channels, axis=1)
        return VALUE_RANGES[self._range](pixels).astype(self._dtype)

    def _run(self, images: np.ndarray) -> np.ndarray:
        pixels = self._prepare(images)
        missing = (self._batch or len(pixels)) - len(pixels)
        if missing:  # a fixed batch's last piece: filled up, and the surplus dropped
            pixels = np.concatenate([pixels, pixels[:1].repeat(missing, axis=0)])
        try:
            found = self._session.run([self._output], {self._input: pixels})[0]
        except Exception as error:  # onnxruntime raises a dozen unrelated classes
            raise FeatureError(f"{self._name} failed on images {pixels.shape}: {error}") from error
        if found.ndim == 4 and found.shape[2:] == (1, 1):
            found = found[..., 0, 0]
        if found.ndim != 2 or len(found) != len(pixels):
            raise FeatureError(
                f"features are one vector per image, (B, D) or (B, D, 1, 1); {self._name} gives {found.shape} for "
                f"{len(pixels)} images"
            )
        return found[: len(images)].astype(np.float32)


class DigitFeatures(OnnxFeatures):
    """The 64 features of the shipped digits classifier, for images (M, 1, 8, 8)."""

    def __init__(self):
        super().__init__(_DIGITS_FILE)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 (M, 64) of digits (M, 1, 8, 8) in [-1, 1].

        Raises:
            ShapeError: images of another shape: the classifier was trained on 8x8 digits alone.
        """
        if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
            raise ShapeError(
                f"the shipped features are for 8x8 grey digits, (M, 1, 8, 8); got {images.shape}; for others train "
                "your own: piflow-edge train-features"
            )
        return super().__call__(images)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """Leave images as they are: the 17 levels of the real digits are none of a PNG's."""
        return images.astype(np.float32)
