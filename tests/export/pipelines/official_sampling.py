"""Few-step sampling as the authors' pipelines do it, on diffusers' own parts, to compare a bundle with."""

import numpy as np
import torch
from safetensors.torch import load_file

import piflow_edge as pf

K = 3


class MixtureTransformer:
    """A transformer of diffusers with an adapter: LoRA by peft, output layers by hand, packed outputs in and out."""

    def __init__(self, transformer, adapter):
        weights = load_file(adapter / "diffusion_pytorch_model.safetensors")
        transformer.load_lora_adapter({k: v for k, v in weights.items() if ".lora_" in k}, prefix=None)
        for name, value in weights.items():
            if name.startswith("norm_out."):
                transformer.get_parameter(name).data.copy_(value)
        transformer.proj_out = torch.nn.Identity()
        transformer.norm_out.register_forward_hook(
            lambda module, given, made: setattr(self, "temb", given[1])
        )
        self.transformer, self.weights = transformer, weights

    def _layer(self, name, features):
        return torch.nn.functional.linear(
            features, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )

    @torch.no_grad()
    def __call__(self, **inputs):
        """Packed means (B, L, K, C 4), log-weights (B, L, K, 4), log-std (B,)."""
        tokens = self.transformer(**inputs, return_dict=False)[0]
        silu = torch.nn.functional.silu
        logstds = self._layer("proj_out_logstds.3", silu(self._layer("proj_out_logstds.1", silu(self.temb))))
        means, logweights = (
            self._layer(f"proj_out_{part}", tokens).unflatten(2, (K, -1)) for part in ("means", "logweights")
        )
        return means, logweights.log_softmax(2), logstds


def draw_latents(predict, noise, nfe=4):
    """Latents (B, C, H, W) from noise. `predict(x_t, sigma)`: means (B, K, C, H, W), log-weights and log-stds."""
    schedule = pf.Schedule(nfe, 3.2, 0.5, substep_rule="ceil")
    x_t = noise.astype(np.float64)
    for i, segment in enumerate(schedule.segments):
        parts = predict(torch.from_numpy(x_t.astype(np.float32)), segment.sigma_src)
        parts = (np.asarray(part, np.float64) for part in parts)
        policy = pf.GMPolicy(*parts, x_t, segment.sigma_src, eps=1e-6)
        if i < nfe - 1:
            policy = policy.temper(0.1 * (nfe - 1))
        ends = (segment.sigma_src, segment.sigma_dst, segment.substeps)
        x_t = pf.rollout(policy, x_t, *ends, shift=3.2, kernel="reference")
    return x_t
