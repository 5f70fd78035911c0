"""A student whose answer is known: Gaussian data, correlated along a ring of pixels, and its exact posterior."""

from types import SimpleNamespace

import numpy as np

from piflow_edge.bundle.manifest import FORMAT_VERSION, Manifest
from piflow_edge.bundle.sections import AxisSpec, LatentSpec, NetworkSpec, ScheduleSpec
from piflow_edge.conditioning import ClassLabels, TensorSpec, Unconditional
from piflow_edge.policies import DXPolicySpec, GMPolicySpec
from piflow_edge.runtime.generator import Generator

SIDE = 4
PIXELS = SIDE * SIDE
# On a ring every pixel has the same variance, which is what one `logstds` per image can say.
DISTANCE = np.minimum(np.arange(PIXELS), PIXELS - np.arange(PIXELS))
COVARIANCE = 0.25 * np.stack([np.roll(np.exp(-DISTANCE / 3), i) for i in range(PIXELS)])


def posterior(x_t, sigma_t):
    """Mean (B, PIXELS) and covariance of x_0 given x_t."""
    alpha = 1 - sigma_t
    gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma_t**2 * np.eye(PIXELS))
    return x_t @ gain.T, COVARIANCE - alpha * gain @ COVARIANCE


class GaussianEngine:
    """Answers with the exact posterior, pixel by pixel; as a GM policy of one component, or a DX policy of N nodes."""

    name, device = "exact", "cpu"

    def __init__(self, *, min_batch=1, max_batch=None, num_nodes=None):
        self.min_batch, self.max_batch, self.num_nodes = min_batch, max_batch, num_nodes
        self.calls, self.closed, self.sizes = [], False, []

    def run(self, inputs):
        x_t, sigma_t = inputs["x_t"], float(inputs["t"][0])
        assert not self.closed and (self.max_batch is None or len(x_t) <= self.max_batch)
        self.calls.append(sigma_t)
        self.sizes.append(len(x_t))
        mean, covariance = posterior(x_t.reshape(len(x_t), PIXELS).astype(float), sigma_t)
        u_t = ((x_t - mean.reshape(x_t.shape)) / sigma_t).astype(np.float32)
        if self.num_nodes is not None:
            bend = np.linspace(0, 0.3, self.num_nodes).reshape(-1, 1, 1, 1)
            return {"grid": (u_t[:, None] * (1 + bend)).astype(np.float32)}
        logstd = 0.5 * np.log(covariance[0, 0]) - np.log(sigma_t)
        return {
            "means": u_t[:, None],
            "logweights": np.zeros((len(x_t), 1, 1, SIDE, SIDE), np.float32),
            "logstds": np.full((len(x_t), 1, 1, 1, 1), logstd, np.float32),
        }

    def close(self):
        self.closed = True


def gaussian_generator(engine=None, *, nfe=4, class_names=("0", "1"), h=0.0, policy=None, **provenance):
    """A generator without files around `engine`."""
    engine = engine or GaussianEngine()
    conditioner = ClassLabels(class_names) if class_names else Unconditional()
    inputs = [TensorSpec(name, "float32", ("batch",)) for name in ("x_t", "t")]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="gaussian",
        policy=policy or GMPolicySpec(1, 1e-4),
        schedule=ScheduleSpec(nfe, 1.0, 1.0, 32, h, 1.0),
        conditioning=conditioner.to_json(),
        latent=LatentSpec("pixels", [1, SIDE, SIDE], 1.0, 0.0),
        axes={"batch": AxisSpec(1, None, 1)},
        networks={"student": NetworkSpec("", [*inputs, *conditioner.inputs], [], {}, 20, {})},
        assets={},
        precisions=["fp32"],
        tolerances={},
        license="",
        provenance=provenance,
        files={},
    )
    bundle = SimpleNamespace(
        name="gaussian",
        manifest=manifest,
        manifest_bytes=repr(manifest).encode(),
        precision=lambda precision: precision or "fp32",
    )
    return Generator(bundle, {"student": engine})


def dx_spec(num_nodes=3, segment_size=0.25):
    return DXPolicySpec(num_nodes, segment_size, 1.0, "grid", 1e-4)
