"""PyTorch network -> ONNX graph. The policy and its integration stay outside."""

import contextlib
import logging
import warnings

import onnx
import torch

from piflow_edge.distill.dit import DiT
from piflow_edge.errors import CheckFailedError

# TensorRT 8.6 (JetPack 6.0) reads up to 17 in full and most of 18; torch's exporter writes 18 or newer.
OPSET = 18

INPUTS = ("x_t", "t", "class_labels")
GM_OUTPUTS = ("means", "logweights", "logstds")
VELOCITY_OUTPUTS = ("u_t",)


def export_network(network: DiT) -> bytes:
    """The network as an ONNX model with a dynamic batch, its weights inside.

    Inputs: `x_t` float32 (batch, C, H, W), `t` float32 (batch,), `class_labels` int64 (batch,). Outputs: `means`,
    `logweights`, `logstds` of a student, `u_t` of a teacher.

    Raises:
        CheckFailedError: the exported graph is not valid ONNX.
    """
    config = network.config
    network = network.eval()
    size = (config.in_channels, config.sample_size, config.sample_size)
    # Two samples: torch.export takes an axis of one for a constant.
    example = (torch.zeros(2, *size), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    batch = torch.export.Dim("batch", min=1)
    outputs = GM_OUTPUTS if config.num_components else VELOCITY_OUTPUTS
    with quiet():
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(outputs),
            dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
            verbose=False,
        )
    return model_bytes(program)


def model_bytes(program: torch.onnx.ONNXProgram) -> bytes:
    """An exported program as a file without traces of this machine, checked.

    Raises:
        CheckFailedError: it is not valid ONNX.
    """
    model = program.model_proto
    for entry in model.metadata_props[:]:
        model.metadata_props.remove(entry)
    for node in model.graph.node:  # stack traces with this machine's paths
        del node.metadata_props[:]
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        del value.metadata_props[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise CheckFailedError(f"the exported graph is not valid ONNX: {error}") from error
    return model.SerializeToString()


@contextlib.contextmanager
def quiet():
    """The exporter's progress and deprecation chatter, silenced: what matters is checked afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
