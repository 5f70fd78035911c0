"""Rollouts, compiled. `integrator.integrate` is the way in; `cpu` and `cuda` wrap the kernels."""
