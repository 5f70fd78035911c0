"""Random policies, as the tests of the kernels take them."""

import numpy as np


def gm_case(seed, *, B=2, K=5, C=3, size=(5, 7), sigma_src=1.0, logstd=-2.0, spread=1.0, sharpness=1.0):
    """Inputs of a GMPolicy in float32; `spread` scales the means, `sharpness` the log-weights."""
    rng = np.random.default_rng(seed)
    return dict(
        means=(spread * rng.standard_normal((B, K, C, *size))).astype(np.float32),
        logweights=(sharpness * rng.standard_normal((B, K, 1, *size))).astype(np.float32),
        logstds=np.full((B, 1, 1, *(1 for _ in size)), logstd, np.float32),
        x_src=rng.standard_normal((B, C, *size)).astype(np.float32),
        sigma_src=sigma_src,
    )


def dx_case(seed, *, B=2, N=4, C=3, size=(5, 7), sigma_src=1.0, **options):
    rng = np.random.default_rng(seed)
    return dict(
        grid=rng.standard_normal((B, N, C, *size)).astype(np.float32),
        x_src=rng.standard_normal((B, C, *size)).astype(np.float32),
        sigma_src=sigma_src,
        segment_size=0.5,
        **options,
    )


def wide(inputs):
    """The same numbers in float64, exactly."""
    return {
        k: v.astype(np.float64) if getattr(v, "dtype", None) == np.float32 else v for k, v in inputs.items()
    }


def levels(sigma_src, sigma_dst=0.0, substeps=16):
    return np.linspace(sigma_src, sigma_dst, substeps + 1)
