"""The ONNX operators that our exports are made of, in NumPy: as the standard defines them, slow and plain.

Each takes its inputs by position, None for one left out, and its attributes by name with the standard's defaults; an
attribute it does not name is one it does not know. Sums and products of half precision are done in float32, as every
runtime does them. Source: the ONNX operator specification, opset 18.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from piflow_edge.engines.onnx_file import DTYPES
from piflow_edge.errors import EngineError

Array = np.ndarray

LARGEST = 1 << 29


def _unary(compute: Callable) -> Callable:
    return lambda x: compute(_wide(x)).astype(x.dtype)


def _wide(x: Array) -> Array:
    """Half precision as float32; anything else as it is."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _binary(compute: Callable) -> Callable:
    def both(a, b):
        _check_room(np.broadcast_shapes(a.shape, b.shape))
        return compute(a, b)

    return both


def _check_room(shape) -> None:
    """Refuse a value that no graph of ours makes, before a broken one takes all the memory there is."""
    if math.prod(shape) > LARGEST:
        raise EngineError(
            f"a value of shape {tuple(shape)} has more than {LARGEST} numbers; use another engine"
        )


def _ints(x: Array | list[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.reshape(x, -1))


def _only(name: str, value, *known) -> None:
    if value not in known:
        raise EngineError(
            f"attribute {name} is {value!r}; engine 'reference' knows {', '.join(map(repr, known))}"
        )


# --- numbers


def _div(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a) // np.abs(b)  # towards zero, which // is not
    return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _pow(x, y):
    return np.power(_wide(x), y.astype(_wide(x).dtype)).astype(x.dtype)


def _clip(x, low=None, high=None):
    return x if low is None and high is None else np.clip(x, low, high).astype(x.dtype)


def _cast(x, *, to, saturate=1):
    if to not in DTYPES:
        raise EngineError(f"a cast goes to ONNX type {to}, which engine 'reference' does not know")
    return x.astype(DTYPES[to])


def _sigmoid(x):
    # From the side where exp cannot overflow.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _softmax(x, *, axis=-1):
    wide = _wide(x)
    e = np.exp(wide - wide.max(axis=axis, keepdims=True))
    return (e / e.sum(axis=axis, keepdims=True)).astype(x.dtype)


def _log_softmax(x, *, axis=-1):
    wide = _wide(x)
    below = wide - wide.max(axis=axis, keepdims=True)
    return (below - np.log(np.exp(below).sum(axis=axis, keepdims=True))).astype(x.dtype)


def _reduce(compute: Callable) -> Callable:
    def reduce(x, axes=None, *, keepdims=1, noop_with_empty_axes=0):
        along = () if axes is None else _ints(axes)
        if not along and noop_with_empty_axes:
            return x
        return compute(_wide(x), axis=along or None, keepdims=bool(keepdims)).astype(x.dtype)

    return reduce


# --- shapes


def _shape(x, *, start=0, end=None):
    return np.array(x.shape[start:end], np.int64)


def _reshape(x, shape, *, allowzero=0):
    wanted = _ints(shape)
    if not allowzero:
        wanted = tuple(x.shape[axis] if n == 0 else n for axis, n in enumerate(wanted))
    return x.reshape(wanted)


def _expand(x, shape):
    wanted = np.broadcast_shapes(x.shape, _ints(shape))
    _check_room(wanted)
    return np.broadcast_to(x, wanted)


def _squeeze(x, axes=None):
    return np.squeeze(x, None if axes is None else _ints(axes))


def _unsqueeze(x, axes):
    return np.expand_dims(x, _ints(axes))


def _transpose(x, *, perm=None):
    return np.transpose(x, perm)


def _concat(*arrays, axis):
    return np.concatenate(arrays, axis)


def _slice(x, starts, ends, axes=None, steps=None):
    starts, ends = _ints(starts), _ints(ends)
    axes = range(len(starts)) if axes is None else _ints(axes)
    steps = (1,) * len(starts) if steps is None else _ints(steps)
    index: list[Any] = [slice(None)] * x.ndim
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def _split(x, sizes=None, *, axis=0, num_outputs: Any = None):
    length = x.shape[axis]
    if sizes is None:
        most = -(-length // num_outputs)
        ends = [min(most * (i + 1), length) for i in range(num_outputs)]
    else:
        ends = np.cumsum(_ints(sizes)).tolist()
        if ends[-1] != length:
            raise ValueError(f"parts of {_ints(sizes)} do not make up an axis of {length}")
    return tuple(np.take(x, range(*bounds), axis) for bounds in pairwise([0, *ends]))


def _gather(x, indices, *, axis=0):
    return np.take(x, indices, axis)


def _constant(**attribute):
    ((name, value),) = attribute.items()
    dtypes = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    _only("of Constant", name, "value", *dtypes)
    return value if name == "value" else np.array(value, dtypes[name])


# --- products


def _matmul(a, b):
    rows, columns = a.shape[-2:-1], b.shape[-1:] if b.ndim > 1 else ()
    _check_room((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns))
    return np.matmul(_wide(a), _wide(b)).astype(a.dtype)


def _gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    a_wide, b_wide = _wide(a), _wide(b)
    product = alpha * ((a_wide.T if transA else a_wide) @ (b_wide.T if transB else b_wide))
    return (product if c is None else product + beta * _wide(c)).astype(a.dtype)


def _einsum(*arrays, equation):
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow or "." in terms:
        raise EngineError(f"equation is {equation!r}; engine 'reference' knows those that name every axis")
    lengths = {
        letter: length
        for term, array in zip(terms.split(","), arrays, strict=True)
        for letter, length in zip(term, array.shape, strict=True)
    }
    _check_room([lengths[letter] for letter in result])
    return np.einsum(equation, *map(_wide, arrays)).astype(arrays[0].dtype)


def _conv(
    x, weight, bias=None, *, kernel_shape=None, strides=None, pads=None, dilations=None, group=1, auto_pad="NOTSET"
):  # fmt: skip
    _only("auto_pad", auto_pad, "NOTSET")
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = pads or [0] * (2 * rank)
    sizes = [
        n + before + after for n, before, after in zip(x.shape[2:], pads[:rank], pads[rank:], strict=True)
    ]
    _check_room((*x.shape[:2], *sizes))
    padded = np.pad(_wide(x), [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    spans = [(n - 1) * d for n, d in zip(weight.shape[2:], dilations, strict=True)]
    counts = [(n - span - 1) // stride + 1 for n, span, stride in zip(sizes, spans, strides, strict=True)]
    _check_room((x.shape[0], weight.shape[0], *counts))
    filters = _wide(weight)
    result = np.zeros((x.shape[0], weight.shape[0], *counts), padded.dtype)
    for tap in np.ndindex(*weight.shape[2:]):  # one weight of the kernel at a time, all places at once
        starts = [i * d for i, d in zip(tap, dilations, strict=True)]
        seen = padded[
            (
                ...,
                *(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, counts, strides, strict=True)),
            )
        ]
        for out, part, weights in zip(
            np.split(result, group, 1),
            np.split(seen, group, 1),
            np.split(filters[(..., *tap)], group, 0),
            strict=True,
        ):
            out += np.moveaxis(np.tensordot(part, weights, (1, 1)), -1, 1)
    if bias is not None:
        result = result + _wide(bias).reshape(-1, *(1,) * rank)
    return result.astype(x.dtype)


# --- normalisation and images


def _normalise(x, axes, epsilon):
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + np.float32(epsilon))


def _layer_normalization(x, scale, bias=None, *, axis=-1, epsilon=1e-5, stash_type=1):
    _only("stash_type", stash_type, 1)
    axes = tuple(range(axis % x.ndim, x.ndim))
    normalised = _normalise(_wide(x), axes, epsilon).astype(x.dtype) * scale
    return normalised if bias is None else normalised + bias


def _instance_normalization(x, scale, bias, *, epsilon=1e-5):
    shape = (-1, *(1,) * (x.ndim - 2))
    normalised = _normalise(_wide(x), tuple(range(2, x.ndim)), epsilon)
    return (normalised * _wide(scale).reshape(shape) + _wide(bias).reshape(shape)).astype(x.dtype)


def _resize(
    x, roi=None, scales=None, sizes: Any = None, *, mode="nearest", nearest_mode="round_prefer_floor",
    coordinate_transformation_mode="half_pixel", antialias=0, keep_aspect_ratio_policy="stretch", exclude_outside=0,
    cubic_coeff_a=-0.75, extrapolation_value=0.0,
):  # fmt: skip
    _only("mode", mode, "nearest")
    _only("nearest_mode", nearest_mode, "floor")
    _only("coordinate_transformation_mode", coordinate_transformation_mode, "asymmetric")
    _only("antialias", antialias, 0)
    _only("keep_aspect_ratio_policy", keep_aspect_ratio_policy, "stretch")
    if scales is not None and scales.size:
        factors = scales.tolist()
        lengths = [int(n * factor) for n, factor in zip(x.shape, factors, strict=True)]
    else:
        lengths = list(_ints(sizes))
        factors = [length / n for length, n in zip(lengths, x.shape, strict=True)]
    _check_room(lengths)
    for axis, (length, factor) in enumerate(zip(lengths, factors, strict=True)):
        if length != x.shape[axis]:
            x = np.take(x, np.floor(np.arange(length) / factor).astype(np.int64), axis)
    return x


# --- whole numbers of 8 bits


def _along(axis: int, values: Array, x: Array) -> Array:
    """One number, or one for each place along an axis, shaped to broadcast against `x`."""
    return (
        values
        if values.ndim == 0
        else values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    )


def _round(x: Array) -> Array:
    return np.rint(x)  # which itself has no signature to check arguments by, before NumPy 2


def _saturate(x: Array, dtype) -> Array:
    return np.clip(x, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def _quantize_linear(x, scale, zero_point=None, *, axis=1, saturate=1):
    zero_point = np.zeros(scale.shape, np.uint8) if zero_point is None else zero_point
    steps = np.rint(_wide(x) / _along(axis, _wide(scale), x))
    return _saturate(steps + _along(axis, zero_point.astype(np.float32), x), zero_point.dtype)


def _dequantize_linear(x, scale, zero_point=None, *, axis=1):
    offset = 0 if zero_point is None else _along(axis, zero_point.astype(np.int32), x)
    return ((x.astype(np.int32) - offset) * _along(axis, _wide(scale), x)).astype(scale.dtype)


def _dynamic_quantize_linear(x):
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = (high - low) / np.float32(255) if high > low else np.float32(1)
    zero_point = _saturate(np.rint(-low / scale), np.uint8)
    return _saturate(np.rint(x / scale) + zero_point, np.uint8), np.array(scale, np.float32), zero_point


def _matmul_integer(a, b, a_zero_point=None, b_zero_point=None):
    # In float64, where products and sums of 8 bits are exact and BLAS is at hand.
    a_wide, b_wide = a.astype(np.float64), b.astype(np.float64)
    if a_zero_point is not None:
        a_wide -= a_zero_point if a_zero_point.ndim == 0 else a_zero_point[..., None]
    if b_zero_point is not None:
        b_wide -= b_zero_point
    return (a_wide @ b_wide).astype(np.int32)


# Name in ONNX -> what computes it. `Scan` is in reference.py: it runs a graph.
OPERATORS: dict[str, Callable] = {
    "Add": _binary(lambda a, b: a + b),
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "Conv": _conv,
    "Cos": _unary(np.cos),
    "DequantizeLinear": _dequantize_linear,
    "Div": _binary(_div),
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "Einsum": _einsum,
    "Erf": _unary(np.vectorize(math.erf, otypes=[np.float64])),
    "Exp": _unary(np.exp),
    "Expand": _expand,
    "Gather": _gather,
    "Gemm": _gemm,
    "Identity": lambda x: x,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _log_softmax,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "Mul": _binary(lambda a, b: a * b),
    "Neg": lambda x: -x,
    "Pow": _binary(_pow),
    "QuantizeLinear": _quantize_linear,
    "Reciprocal": _unary(lambda x: 1 / x),
    "ReduceMean": _reduce(np.mean),
    "ReduceSum": _reduce(np.sum),
    "Relu": lambda x: np.maximum(x, 0),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _round,
    "Shape": _shape,
    "Sigmoid": _unary(_sigmoid),
    "Sin": _unary(np.sin),
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _unary(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(lambda a, b: a - b),
    "Tanh": _unary(np.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
