"""The rollout as ONNX functions: many substeps on a Gaussian mixture, one weighted sum on a DX grid.

Time is worked out here, in float64; the graph is handed float32 tables of it and computes in float32, of which every
execution provider is capable. Functions belong in a model's `functions`; `inline` turns their calls into plain nodes.
"""

import numpy as np
import onnx
from onnx.inliner import inline_local_functions

from piflow_edge.errors import ScheduleError
from piflow_edge.export.to_onnx import OPSET
from piflow_edge.policies import DXPolicy

DOMAIN = "piflow_edge"

# GMPolicy's Euler substeps in the coordinates of kernels/gm_rollout.h, where float32 suffices at every noise level:
# with g the policy's velocity at the source and s its noise level, the state is kept as its distance from the straight
# line along g, in units of s,
#
#     x_t = x_src + (sigma_t - s) g + s y,
#
# and components as offsets d_k from g. `noise` is where the line meets sigma 1. With V = exp(2 logstds), Z, Y and N
# as in `gm_substeps`, and D = 1 + V Z, a substep is
#
#     f = -(Y y + N noise) / D        w = softmax_k(logweights_k + d_k . f - Z/D |d_k|^2 / 2)
#     y <- y + step (y + V f + sum_k w_k d_k / D)
#
# Offsets are kept in two layouts: ONNX Runtime sums over the last axis but one ten times as fast as over the first.
# Sums are not products with a row of ones, which would be faster still, because a GPU may round those to TF32.
_GM_ROLLOUT = """
<domain: "{domain}", opset_import: ["": {opset}]>
GMRollout (means, logweights, logstds, x_src, sigma_src, sigma_dst, temperature, substeps) => (x_dst)
{{
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  one = Constant <value_float = 1.0> ()
  two = Constant <value_float = 2.0> ()
  half = Constant <value_float = 0.5> ()

  batch_k_c_pixels = Constant <value_ints = [0, 0, 0, -1]> ()
  batch_k_pixels = Constant <value_ints = [0, 0, -1]> ()
  batch_1_1 = Constant <value_ints = [0, 1, 1]> ()
  velocities = Reshape (means, batch_k_c_pixels)
  x = Reshape (x_src, batch_k_pixels)
  logweights_of_pixels = Reshape (logweights, batch_k_pixels)
  sharp_logweights = Div (logweights_of_pixels, temperature)
  logstd = Reshape (logstds, batch_1_1)
  logvariance = Mul (logstd, two)
  wide_variance = Exp (logvariance)
  variance = Mul (wide_variance, temperature)

  weights_at_src = Softmax <axis = 1> (sharp_logweights)
  weights_of_c = Unsqueeze (weights_at_src, axis_2)
  weighted = Mul (weights_of_c, velocities)
  velocity = ReduceSum <keepdims = 0> (weighted, axis_1)
  velocity_of_k = Unsqueeze (velocity, axis_1)
  offsets_kc = Sub (velocities, velocity_of_k)
  offsets_ck = Transpose <perm = [0, 2, 1, 3]> (offsets_kc)
  squares = Mul (offsets_kc, offsets_kc)
  sum_of_squares = ReduceSum <keepdims = 0> (squares, axis_2)
  half_squares = Mul (sum_of_squares, half)
  alpha_src = Sub (one, sigma_src)
  towards_noise = Mul (alpha_src, velocity)
  noise = Add (x, towards_noise)

  Z, Y, N, steps = Split <axis = 1, num_outputs = 4> (substeps)
  excess = Mul (variance, Z)
  D = Add (excess, one)
  Y_over_D = Div (Y, D)
  N_over_D = Div (N, D)
  from_y = Neg (Y_over_D)
  from_noise = Neg (N_over_D)
  from_squares = Div (Z, D)
  from_mean = Div (steps, D)

  y_src = Sub (x, x)
  y_dst = Scan <num_scan_inputs = 5, body = substep (
    float[] y, float[] c_y, float[] c_noise, float[] c_squares, float[] step, float[] c_mean
  ) => (float[] y_next) {{
    f_y = Mul (c_y, y)
    f_noise = Mul (c_noise, noise)
    f = Add (f_y, f_noise)
    f_of_k = Unsqueeze (f, axis_1)
    products = Mul (offsets_kc, f_of_k)
    evidence = ReduceSum <keepdims = 0> (products, axis_2)
    penalty = Mul (c_squares, half_squares)
    prior = Sub (sharp_logweights, penalty)
    logits = Add (prior, evidence)
    weights = Softmax <axis = 1> (logits)
    weights_of_channels = Unsqueeze (weights, axis_1)
    shares = Mul (weights_of_channels, offsets_ck)
    mean = ReduceSum <keepdims = 0> (shares, axis_2)
    V_f = Mul (variance, f)
    u = Add (y, V_f)
    step_u = Mul (step, u)
    step_mean = Mul (c_mean, mean)
    y_half_way = Add (y, step_u)
    y_next = Add (y_half_way, step_mean)
  }}> (y_src, from_y, from_noise, from_squares, steps, from_mean)

  span = Sub (sigma_dst, sigma_src)
  along = Mul (span, velocity)
  on_line = Add (x, along)
  off_line = Mul (sigma_src, y_dst)
  x_end = Add (on_line, off_line)
  shape = Shape (x_src)
  x_dst = Reshape (x_end, shape)
}}
"""

_DX_ROLLOUT = """
<domain: "{domain}", opset_import: ["": {opset}]>
DXRollout (grid, x_src, weights) => (x_dst)
{{
  axis_1 = Constant <value_ints = [1]> ()
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  end = Constant <value_ints = [9223372036854775807]> ()
  column = Constant <value_ints = [-1, 1]> ()
  batch_n_values = Constant <value_ints = [0, 0, -1]> ()
  src_weight = Slice (weights, first, second, first)
  node_weights = Slice (weights, second, end, first)
  node_column = Reshape (node_weights, column)
  nodes = Reshape (grid, batch_n_values)
  weighted = Mul (node_column, nodes)
  flat_sum = ReduceSum <keepdims = 0> (weighted, axis_1)
  shape = Shape (x_src)
  nodes_sum = Reshape (flat_sum, shape)
  from_src = Mul (src_weight, x_src)
  x_dst = Add (from_src, nodes_sum)
}}
"""


def gm_rollout() -> onnx.FunctionProto:
    """`GMRollout`: the state at the end of a segment that begins at its GM policy's source.

    Inputs, all float32: `means`, `logweights`, `logstds`, `x_src` as in `GMPolicy`, with any axes after C;
    scalars `sigma_src`, `sigma_dst` and `temperature` (1 leaves the mixture); `substeps` from `gm_substeps`.
    """
    return onnx.parser.parse_function(_GM_ROLLOUT.format(domain=DOMAIN, opset=OPSET))


def gm_substeps(sigmas: np.ndarray, eps: float) -> np.ndarray:
    """What `GMRollout` must know of time: for each substep Z, Y, N and its length relative to sigma.

    Args:
        sigmas: noise levels of the rollout, from the policy's source down, float64 (S + 1,).
        eps: floor of the policy.

    Returns:
        float32, (S, 4, 1, 1).

    Raises:
        ScheduleError: a substep begins below `eps`, where the policy's formula is another one.
    """
    s, sigma, sigma_next = sigmas[0], sigmas[:-1], sigmas[1:]
    if not np.all(sigma >= eps):
        raise ScheduleError(
            f"a rollout in the graph takes noise levels down to the policy's eps, {eps}; got one of {sigma.min():.3g}; "
            "use fewer substeps or a larger shift"
        )
    N = (s - sigma) / sigma
    Z = s * N * (1 / s + 1 / sigma - 2)
    Y = s**2 * (1 - sigma) / sigma**2
    step = (sigma_next - sigma) / sigma
    return np.stack([Z, Y, N, step], axis=1)[..., None, None].astype(np.float32)


def dx_rollout() -> onnx.FunctionProto:
    """`DXRollout`: the state at the end of a segment that begins at its DX policy's source.

    Inputs, all float32: `grid` and `x_src` as in `DXPolicy`, with any axes after C; `weights` from `dx_weights`.
    """
    return onnx.parser.parse_function(_DX_ROLLOUT.format(domain=DOMAIN, opset=OPSET))


def dx_weights(policy: DXPolicy, sigmas: np.ndarray) -> np.ndarray:
    """What `DXRollout` must know of time: the weights of `x_src` and of each grid entry, float32 (1 + N,).

    Args:
        policy: any policy with the source and settings of the one in the graph; its values do not matter.
        sigmas: noise levels of the rollout, from the policy's source down, float64 (S + 1,).
    """
    start, src, *nodes = policy.rollout_weights(sigmas)
    return np.array([start + src, *nodes], np.float32)  # the rollout starts at the source


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions of its own, for runtimes that know none; checked."""
    model = inline_local_functions(model)
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.checker.check_model(model, full_check=True)
    return model
