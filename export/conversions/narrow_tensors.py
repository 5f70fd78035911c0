"""Weights of a graph in fewer bits: what every conversion does with one of them."""

import math

import numpy as np
from onnx import TensorProto, numpy_helper

# Values of a weight from which on it is worth an operator that widens it.
_LEAST = 4096
_FP16_LARGEST = float(np.finfo(np.float16).max)


def is_worth_it(tensor: TensorProto) -> bool:
    """Return True for float32 weights, of two axes or more, that take some memory."""
    return tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and math.prod(tensor.dims) >= _LEAST


def halve(tensor: TensorProto) -> TensorProto | None:
    """Return a tensor in fp16; None where its values do not fit."""
    values = numpy_helper.to_array(tensor)
    if not np.abs(values).max() <= _FP16_LARGEST:
        return None
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)


def round_to_int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix as int8, and what that is multiplied by, float32: one scale for all values along `axis`.

    The scales keep that axis, with the length 1.
    """
    scales = np.abs(values).max(axis, keepdims=True) / 127
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(values / scales).astype(np.int8), scales
