"""The GM rollout in plain torch operations: what TorchScript compiles for the benchmarks."""

import torch


def gm_in_torch(
    means: torch.Tensor,
    logweights: torch.Tensor,
    logstds: torch.Tensor,
    x_t: torch.Tensor,
    sigmas: list[float],
) -> torch.Tensor:
    """GMPolicy.velocity in the Euler loop, for TorchScript; the rollout starts at the policy's source."""
    eps = 1e-4  # TorchScript sees no globals
    sigma_src = sigmas[0]
    x_src = x_t
    x_0_means = x_src.unsqueeze(1) - sigma_src * means
    variance = torch.exp(2 * logstds) * sigma_src**2
    half_squares = x_0_means.square().sum(2, keepdim=True) * 0.5
    a = max(sigma_src, eps)
    for i in range(len(sigmas) - 1):
        b = max(sigmas[i], eps)
        zeta = ((1 - b) / b) ** 2 - ((1 - a) / a) ** 2
        nu = ((1 - b) / b**2 * x_t - (1 - a) / a**2 * x_src).unsqueeze(1)
        denominator = (variance * zeta + 1).clamp(min=eps)
        evidence = (x_0_means * nu).sum(2, keepdim=True) - zeta * half_squares
        weights = torch.softmax(logweights + evidence / denominator, 1)
        mean = (weights * x_0_means).sum(1, keepdim=True)
        x_0 = ((variance * nu + mean) / denominator).squeeze(1)
        x_t = x_t + (x_t - x_0) / b * (sigmas[i + 1] - sigmas[i])
    return x_t
