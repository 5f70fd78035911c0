"""Policies as the recorded cases describe them."""

import numpy as np

from piflow_edge import DXPolicy, GMPolicy
from piflow_edge.schedule import resolution_shift


def sampler_shift(case):
    """The shift the case's states were sampled with, worked out from the resolution where it is dynamic."""
    if case.params.get("use_dynamic_shifting"):
        names = ("base_seq_len", "max_seq_len", "base_logshift", "max_logshift")
        return resolution_shift(case.params["seq_len"], **{name: case.params[name] for name in names})
    return case.params.get("sampler_shift", case.params.get("shift"))


def make_policy(case, library, dtype, *, prefix="", eps=None):
    """The policy of a recorded case, its inputs in `dtype` and in the given array library."""

    def source(name):
        return library.array(case[prefix + name].astype(dtype))

    sigma_src = case.source("sigma_t_src", np.float64 if dtype == np.float64 else np.float32)
    eps = case.params.get("policy_eps", case.params.get("eps")) if eps is None else eps
    if "means" in case:
        return GMPolicy(
            source("means"), source("logweights"), source("logstds"), source("x_t_src"), sigma_src, eps=eps
        )
    params = case.params
    return DXPolicy(
        source("denoising_output"),
        source("x_t_src"),
        sigma_src,
        segment_size=params.get("policy_segment_size", params.get("segment_size")),
        shift=params.get("policy_shift", params.get("shift")),
        mode=params.get("policy_mode", params.get("mode")),
        eps=eps,
    )
