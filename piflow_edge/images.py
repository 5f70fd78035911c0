"""Latents <-> the pixels of images."""

import numpy as np

from .bundle import LatentSpec


def decode(latents: np.ndarray, spec: LatentSpec | None = None) -> np.ndarray:
    """Latents (B, C, H, W) -> images, uint8 (B, H, W, C). Without a `spec`, latents are pixels from -1 to 1."""
    pixels = latents if spec is None else latents / spec.scale + spec.shift
    if not isinstance(latents, np.ndarray):
        from .kernels import gpu_arrays  # the array came from there

        pixels = gpu_arrays.round(gpu_arrays.clip((pixels + 1) * 127.5, 0, 255))
        # Bytes are what crosses the bus.
        return gpu_arrays.to_host(gpu_arrays.astype(gpu_arrays.permute_dims(pixels, (0, 2, 3, 1)), "uint8"))
    pixels = np.clip((pixels + 1) * 127.5, 0, 255)
    return np.ascontiguousarray(np.rint(pixels).astype(np.uint8).transpose(0, 2, 3, 1))


def as_pil(images: np.ndarray) -> list:
    """uint8 (B, H, W, C) -> PIL images, grey for C = 1."""
    from PIL import Image  # only needed where pictures are made

    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]
