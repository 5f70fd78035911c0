"""A network of a few numbers, with the inputs that a student has."""

import numpy as np

TABLE = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
SHAPES = {"x_t": (2, 3), "t": (), "class_labels": ()}
_TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 2, 3] x_t, float[batch] t, int64[batch] class_labels) => (float[batch, 2, 3] u, float[batch, 2, 3] w)
{
  axes = Constant <value_ints = [1, 2]> ()
  steps = Unsqueeze (t, axes)
  scaled = Mul (x_t, steps)
  narrow = Cast <to = 10> (scaled)
  wide = Cast <to = 1> (narrow)
  added = Gather (table, class_labels)
  u = Add (wide, added)
  w = Neg (u)
}
"""


def model():
    """The ONNX model, as `onnx` has it."""
    import onnx

    made = onnx.parser.parse_model(_TEXT)
    made.graph.initializer.append(onnx.numpy_helper.from_array(TABLE, "table"))
    return made


def profile(least=1, best=2, most=4):
    """Least, best and greatest shapes of the inputs."""
    return {name: tuple((size, *rest) for size in (least, best, most)) for name, rest in SHAPES.items()}


def inputs(batch, seed=0):
    """Random ones, and the outputs they make: {name: array} twice."""
    random = np.random.default_rng(seed)
    x_t = random.standard_normal((batch, 2, 3)).astype(np.float32)
    t = random.standard_normal(batch).astype(np.float32)
    labels = random.integers(0, 4, batch)
    u = (x_t * t[:, None, None]).astype(np.float16).astype(np.float32) + TABLE[labels]
    return {"x_t": x_t, "t": t, "class_labels": labels}, {"u": u, "w": -u}
