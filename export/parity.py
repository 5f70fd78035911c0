"""The PyTorch side of the comparison: golden samples that every export must reproduce before it is moved in place."""

import io
import math

import numpy as np
import torch

from piflow_edge.bundle.manifest import Manifest
from piflow_edge.conditioning import Conditioner, ConditionRequest
from piflow_edge.distill.data.autoencoder import Autoencoder
from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.distill.stored_weights import has_stored
from piflow_edge.export.conversions.calibration import count_images
from piflow_edge.integrator import rollout_sigmas, take_euler_steps
from piflow_edge.noise import philox_normal
from piflow_edge.runtime.images import decode
from piflow_edge.runtime.verification import GOLDEN_SEED, PROMPTS
from piflow_edge.system.progress import announce

# Golden images per bundle, of a large network or of large policies fewer: enough to see, few enough to keep a bundle
# small.
GOLDEN_IMAGES = 10
# Values of their policies, all together, that more than one image may have.
_GOLDEN_VALUES = 250_000


@torch.no_grad()
def golden_samples(
    network: FlowNetwork, manifest: Manifest, conditioner: Conditioner
) -> dict[str, np.ndarray]:
    """Run the student in PyTorch, policies in float64, and record every layer; see `verification`.

    `conditioner`: the student's, opened where it reads prompts.
    """
    spec, schedule = manifest.schedule, manifest.schedule.schedule()
    count = _count_golden_images(network, manifest)
    indices = range(count)
    conditioning = manifest.example(count, conditioner=conditioner)
    given = {name: torch.from_numpy(array) for name, array in conditioning.items()}
    shape = manifest.latent.shape
    x_t = philox_normal(GOLDEN_SEED, indices, shape)
    golden = {"noise": x_t, **{f"conditioning.{name}": array for name, array in conditioning.items()}}
    golden |= _trace_prompts(conditioner, count)
    is_long = has_stored(network)
    for i, segment in enumerate(schedule.segments):
        if is_long:
            announce(f"golden samples: call {i + 1} of {schedule.nfe}")
        sigma = torch.full((len(x_t),), segment.sigma_src)
        parts = network(torch.from_numpy(x_t), sigma, **given)
        outputs = {name: part.numpy() for name, part in zip(manifest.policy.outputs, parts, strict=True)}
        golden[f"x_t.{i}"] = x_t
        golden |= {f"{name}.{i}": part for name, part in outputs.items()}
        wide = {name: part.astype(np.float64) for name, part in outputs.items()}
        x_src = x_t.astype(np.float64)
        policy = manifest.policy.policy(wide, x_src, segment.sigma_src)
        # The source, and down to a tenth of the way above the segment's end, where velocities are still tame.
        levels = segment.sigma_src + np.array([0.0, 0.5, 0.9]) * (segment.sigma_dst - segment.sigma_src)
        golden[f"levels.{i}"] = levels
        velocities = [policy.velocity(x_src, level) for level in levels.tolist()]
        # In float32 they take half the bytes, and are far finer than verify allows.
        golden[f"velocities.{i}"] = np.stack(velocities).astype(np.float32)
        if i < schedule.nfe - 1:
            policy = policy.temper(spec.temperature_of(schedule.nfe))
        ends = (segment.sigma_src, segment.sigma_dst, segment.substeps)
        x_dst = take_euler_steps(policy, x_src, rollout_sigmas(*ends, schedule.shift))
        if segment.renoises:
            x_dst = segment.renoise(x_dst, philox_normal(GOLDEN_SEED, indices, shape, draw=i + 1))
        x_t = x_dst.astype(np.float32)
    golden["latents"] = x_t
    return golden | _resized_samples(network, manifest, golden["noise"], conditioner)


def _count_golden_images(network: FlowNetwork, manifest: Manifest) -> int:
    policy = sum(map(math.prod, manifest.policy.output_shapes(tuple(manifest.latent.shape))))
    values = policy * manifest.schedule.schedule().nfe
    most = min(GOLDEN_IMAGES, max(1, _GOLDEN_VALUES // values))
    return count_images(most, sum(parameter.numel() for parameter in network.parameters()))


def _trace_prompts(conditioner: Conditioner, count: int) -> dict[str, np.ndarray]:
    """The examples' prompts and their token ids; nothing where no prompts are read."""
    prompts = conditioner.example_prompts(count)
    if not prompts:
        return {}
    return {PROMPTS: np.array(prompts), **conditioner.trace(ConditionRequest(prompts=prompts))}


def _resized_samples(
    network: FlowNetwork, manifest: Manifest, noise: np.ndarray, conditioner: Conditioner
) -> dict[str, np.ndarray]:
    """One call more, where named axes have other lengths; nothing where there are none."""
    if not manifest.has_several_lengths:
        return {}
    golden = {}
    if manifest.sizes is not None:
        noise = philox_normal(GOLDEN_SEED, range(len(noise)), manifest.resized_shape)
        golden["resized.x_t"] = noise
    conditioning = manifest.example(len(noise), resized=True, conditioner=conditioner)
    given = {name: torch.from_numpy(array) for name, array in conditioning.items()}
    sigma = torch.full((len(noise),), manifest.schedule.schedule().segments[0].sigma_src)
    parts = network(torch.from_numpy(noise), sigma, **given)
    golden |= {f"resized.conditioning.{name}": array for name, array in conditioning.items()}
    return golden | {
        f"resized.{name}": part.numpy() for name, part in zip(manifest.policy.outputs, parts, strict=True)
    }


def golden_images(latents: np.ndarray, manifest: Manifest, autoencoder: Autoencoder | None) -> np.ndarray:
    """The images of golden latents, uint8 (B, H, W, C), from PyTorch where there is an autoencoder."""
    if autoencoder is None:
        return decode(latents, manifest.latent)
    unscaled = torch.from_numpy(np.asarray(manifest.latent.restore(latents), np.float32))
    # One at a time: large images would not fit otherwise.
    return decode(torch.cat([autoencoder.decode(one) for one in unscaled.split(1)]).numpy())


def golden_file(golden: dict[str, np.ndarray]) -> bytes:
    """The golden samples as the bytes of `golden.npz`."""
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **golden)
    return file.getvalue()
