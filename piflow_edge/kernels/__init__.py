"""Rollouts, compiled. `integrator.integrate` is the way in; `cpu` wraps the library, `cuda` the GPU's kernels."""
