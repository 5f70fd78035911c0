"""A small classifier -> a feature extractor as ONNX, for `evaluate --features FILE.onnx`.

`python -m piflow_edge.export.feature_extractor --out FILE` makes the one for 8x8 digits that ships with the package.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from piflow_edge.distill.data.datasets import ImageData, load_images
from piflow_edge.distill.data.image_data import CaptionedData
from piflow_edge.distill.networks.classifier import SmallClassifier, TrainedClassifier, train_classifier
from piflow_edge.distill.networks.prompt_pair import PromptHead, TrainedPair, train_prompt_pair
from piflow_edge.engines import Graph, open_engine
from piflow_edge.errors import CheckFailedError
from piflow_edge.export.onnx_graphs.to_onnx import OPSET
from piflow_edge.system.files import write_atomic
from piflow_edge.system.pixels import DESCRIPTION_KEY, RANGE_KEY, round_to_bytes

# Relative to the largest feature; PyTorch and ONNX Runtime add up a few thousand float32 products in another order.
_TOLERANCE = 1e-4


def train_features(
    data: ImageData, path: Path, *, iterations: int | None = None, seed: int = 0
) -> TrainedClassifier:
    """Train a classifier on `data` and write its features to `path`, an .onnx file for `open_features`.

    Args:
        data: images of two classes or more.
        path: the file; its folder is made.
        iterations, seed: see `train_classifier`.

    Raises:
        DataError, CheckFailedError: see `train_classifier`; the file does not give the classifier's features.
    """
    trained = train_classifier(data, iterations=iterations, seed=seed)
    held_out = trained.accuracy["held_out"]
    description = (
        f"{trained.classifier.hidden.out_features} features of a small classifier of {data.name!r} "
        f"({held_out:.0%} of held-out images right), not Inception's"
    )
    _write_features(trained.classifier, path, description)
    return trained


def train_prompt_features(
    data: CaptionedData, path: Path, *, iterations: int | None = None, seed: int = 0
) -> tuple[TrainedPair, Path]:
    """Train a pair on images and captions, and write it as two .onnx files for `PromptFeatures`.

    Args:
        data: images steered by their captions.
        path: the file of the images' side, whose features `open_features` takes too; its folder is made.
        iterations, seed: see `train_prompt_pair`.

    Returns:
        The pair, and the file of the prompts' side, beside `path`.

    Raises:
        DataError, CheckFailedError: see `train_prompt_pair`; a file does not give the pair's vectors.
    """
    pair = train_prompt_pair(data, iterations=iterations, seed=seed)
    description = (
        f"{pair.classifier.hidden.out_features} features of a small network that finds a held-out image's caption of "
        f"{data.name!r} among 99 others in {pair.accuracy['held_out']:.0%}"
    )
    _write_features(pair.classifier, path, description)
    beside = path.with_suffix(".prompts.onnx")
    graph = prompt_graph(pair.head, pair.pooled_input, {DESCRIPTION_KEY: description})
    pooled = torch.from_numpy(data.conditioning(np.arange(3))[pair.pooled_input].astype(np.float32))
    _compare(graph, {pair.pooled_input: pooled.numpy()}, pair.head(pooled).numpy(), beside.name)
    write_atomic(beside, graph)
    return pair, beside


def write_digits_features(path: Path) -> TrainedClassifier:
    """Train the classifier of 8x8 digits that ships with the package and write its features to `path`."""
    trained = train_classifier(load_images("digits"), held_out=297)
    trained.classifier.load_state_dict({k: v.half() for k, v in trained.classifier.state_dict().items()})
    _write_features(trained.classifier, path, "64 features of the shipped digits classifier, not Inception's")
    return trained


def _write_features(classifier: SmallClassifier, path: Path, description: str) -> None:
    """Write the file once its features are those of the classifier."""
    graph = feature_graph(classifier, {RANGE_KEY: "-1,1", DESCRIPTION_KEY: description})
    _check(classifier, graph, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, graph)


def feature_graph(classifier: SmallClassifier, metadata: dict[str, str]) -> bytes:
    """The classifier up to its features as ONNX: `images` float32 (batch, C, H, W) -> `features` (batch, D)."""
    nodes, value = [], "images"
    for number in range(1, classifier.depth + 1):
        layer = f"conv_{number}"
        stride = list(getattr(classifier, layer).stride)
        nodes += [
            helper.make_node(
                "Conv", [value, f"{layer}.weight", f"{layer}.bias"], [layer], pads=[1] * 4, strides=stride
            ),
            helper.make_node("Sigmoid", [layer], [f"{layer}.gate"]),
            helper.make_node("Mul", [layer, f"{layer}.gate"], [f"{layer}.silu"]),
        ]
        value = f"{layer}.silu"
    nodes += [
        helper.make_node("Flatten", [value], ["flat"]),
        helper.make_node("Gemm", ["flat", "hidden.weight", "hidden.bias"], ["features"], transB=1),
    ]
    weights = [
        numpy_helper.from_array(value.numpy(), name)
        for name, value in classifier.state_dict().items()
        if not name.startswith("out.")
    ]
    size = [classifier.channels, classifier.size, classifier.size]
    return _build_model(nodes, ("images", size), classifier.hidden.out_features, weights, metadata)


def prompt_graph(head: PromptHead, pooled_input: str, metadata: dict[str, str]) -> bytes:
    """The head as ONNX: pooled vectors of a text encoder, float32 (batch, P) -> `features` (batch, D)."""
    nodes = [
        helper.make_node(
            "LayerNormalization",
            [pooled_input, "norm.weight", "norm.bias"],
            ["normed"],
            epsilon=head.norm.eps,
        ),
        helper.make_node("Gemm", ["normed", "hidden.weight", "hidden.bias"], ["wide"], transB=1),
        helper.make_node("Sigmoid", ["wide"], ["gate"]),
        helper.make_node("Mul", ["wide", "gate"], ["silu"]),
        helper.make_node("Gemm", ["silu", "out.weight", "out.bias"], ["features"], transB=1),
    ]
    weights = [numpy_helper.from_array(value.numpy(), name) for name, value in head.state_dict().items()]
    size = [head.hidden.in_features]
    return _build_model(nodes, (pooled_input, size), head.out.out_features, weights, metadata)


def _build_model(
    nodes: list, given: tuple[str, list[int]], width: int, weights: list, metadata: dict[str, str]
) -> bytes:
    name, size = given
    graph = helper.make_graph(
        nodes,
        "features",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *size])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    model = helper.make_model(
        graph, producer_name="piflow-edge", opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@torch.no_grad()
def _check(classifier: SmallClassifier, graph: bytes, name: str) -> None:
    """Hold the graph to the classifier it was made from."""
    shape = (3, classifier.channels, classifier.size, classifier.size)
    images = round_to_bytes(np.random.default_rng(0).uniform(-1, 1, shape))
    expected = classifier.features(torch.from_numpy(images)).numpy()
    _compare(graph, {"images": images}, expected, name)


def _compare(graph: bytes, inputs: dict[str, np.ndarray], expected: np.ndarray, name: str) -> None:
    found = open_engine(Graph(graph), engine="ort-cpu").run(inputs)["features"]
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error <= _TOLERANCE:
        raise CheckFailedError(f"{name} differs from the network it was made from by {error:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Train the digits classifier whose features FID is measured in."
    )
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    trained = write_digits_features(parser.parse_args().out)
    print(json.dumps({"accuracy": trained.accuracy, "images": trained.images}))
