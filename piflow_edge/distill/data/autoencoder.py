"""Autoencoders of diffusers, from a folder: images to latents and back."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from piflow_edge.errors import DataError, MissingExtraError
from piflow_edge.system.cache_folder import cache_folder
from piflow_edge.system.files import sha256
from piflow_edge.system.progress import progress

from .array_cache import ArrayWriter, load_or_build
from .datasets import ImageData, Latent


@dataclass(frozen=True)
class AutoencoderKind:
    """How one class of diffusers is called. To add one, add a line to `KINDS`.

    Args:
        decode: module, latents (B, C, H, W) -> images (B, C, H, W).
        encode: module, images -> latents, of a distribution its mean; None where only the decoder is of use here.
        moments: module -> mean and deviation of every channel, which latents are scaled by; None of most.
        has_scale: whether latents are scaled by its configuration's `scaling_factor` and `shift_factor`.
    """

    decode: Callable[[Any, Tensor], Tensor]
    encode: Callable[[Any, Tensor], Tensor] | None = None
    moments: Callable[[Any], tuple[list[float], list[float]]] | None = None
    has_scale: bool = True


def _decode_plainly(module: Any, latents: Tensor) -> Tensor:
    return module.decode(latents, return_dict=False)[0]


def _decode_frame(module: Any, latents: Tensor) -> Tensor:
    """Of an autoencoder for videos: an image is a video of one frame."""
    return module.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]


def _decode_normalised(module: Any, latents: Tensor) -> Tensor:
    """Of FLUX.2: latents are normalised patch by patch, the four places of a patch by numbers of their own."""
    squares = functional.pixel_unshuffle(latents, 2)
    mean, variance = (stat.view(1, -1, 1, 1) for stat in (module.bn.running_mean, module.bn.running_var))
    squares = squares * (variance + module.config.batch_norm_eps).sqrt() + mean
    return _decode_plainly(module, functional.pixel_shuffle(squares, 2))


KINDS = {
    "AutoencoderKL": AutoencoderKind(_decode_plainly, lambda m, images: m.encode(images).latent_dist.mode()),
    "AutoencoderTiny": AutoencoderKind(_decode_plainly, lambda m, images: m.encode(images).latents),
    "AutoencoderKLQwenImage": AutoencoderKind(
        _decode_frame, moments=lambda m: (list(m.config.latents_mean), list(m.config.latents_std))
    ),
    "AutoencoderKLFlux2": AutoencoderKind(_decode_normalised, has_scale=False),
}
# Changes whenever the same images and autoencoder would give other latents.
_LATENTS_FORMAT = 1
# Pixels that go through the networks at a time.
_PIXELS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder, ready to be called. `kind`: its class in diffusers. `sha256`: of its settings and weights.

    `latent`: how a flow network sees its latents. `channels`, `latent_channels`: C of images and latents. `mean`,
    `deviation`: of every channel of the latents, beside scale and shift; empty for most.
    """

    kind: str
    module: Any  # of diffusers
    sha256: str
    latent: Latent
    channels: int
    latent_channels: int
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> latents, not scaled; of a distribution its mean."""
        encode = KINDS[self.kind].encode
        assert encode is not None, "only its decoder is of use here"
        return encode(self.module, images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W), not scaled -> images, from -1 to 1 and perhaps a little beyond."""
        return KINDS[self.kind].decode(self.module, latents)


def load_autoencoder(folder: Path) -> Autoencoder:
    """Read an autoencoder that diffusers saved; nothing is downloaded, and no code in the folder is run.

    Args:
        folder: with `config.json` and safetensors weights, as `save_pretrained` leaves it, of one of `KINDS`.

    Raises:
        DataError: there is none, or none of these; parts of its weights are missing.
        MissingExtraError: diffusers is not installed.
    """
    folder = Path(folder)
    config = _config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise DataError(f"the autoencoder in {folder} has no safetensors weights; save it as safetensors")
    kind = config["_class_name"]
    module = _module(folder, kind)
    # What starts with an underscore says which release saved it, and where.
    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    hashes = [kind, settings, [sha256(file.read_bytes()) for file in weights]]
    digest = sha256(json.dumps(hashes, sort_keys=True).encode())
    found: Any = module.config
    how = KINDS[kind]
    mean, deviation = how.moments(module) if how.moments else ((), ())
    scale, shift = (found.get(name) if how.has_scale else None for name in ("scaling_factor", "shift_factor"))
    return Autoencoder(
        kind,
        module,
        digest,
        Latent(1.0 if scale is None else float(scale), 0.0 if shift is None else float(shift), digest),
        found.get("in_channels", found.get("input_channels", 3)),
        found.get("latent_channels", found.get("z_dim")),
        tuple(map(float, mean)),
        tuple(map(float, deviation)),
    )


def encode(data: ImageData, autoencoder: Autoencoder, *, device: str | None = None) -> ImageData:
    """The latents of all images, made once and then kept in the cache.

    Args:
        data: pixels; grey ones are given to an autoencoder for colour as colour.
        autoencoder: see `load_autoencoder`.
        device: to run on; None is the first GPU, else the CPU.

    Raises:
        DataError: the data holds latents already; images the autoencoder does not take; latents that are not finite.
    """
    if data.latent:
        raise DataError(f"{data.name!r} holds latents already; leave --autoencoder out, or give images")
    if KINDS[autoencoder.kind].encode is None:
        able = ", ".join(kind for kind, how in KINDS.items() if how.encode)
        raise DataError(f"images are encoded by {able}; an {autoencoder.kind} is for export only")
    if data.shape[0] not in (1, autoencoder.channels):
        raise DataError(
            f"the autoencoder takes images of {autoencoder.channels} channels; those of {data.name!r} have "
            f"{data.shape[0]}"
        )

    def restore(latents: np.ndarray, known: dict) -> ImageData:
        if len(latents) != len(data):
            raise ValueError("latents and labels do not fit")
        return replace(data, images=latents, latent=autoencoder.latent)

    def build(writer: ArrayWriter) -> dict:
        _encode_all(data, autoencoder, device or ("cuda" if torch.cuda.is_available() else "cpu"), writer)
        return {}

    key = sha256(json.dumps([_LATENTS_FORMAT, data.fingerprint(), autoencoder.sha256]).encode())[:32]
    return load_or_build(cache_folder() / "latents" / key, f"the latents of {data.name!r}", build, restore)


def _encode_all(data: ImageData, autoencoder: Autoencoder, device: str, writer: ArrayWriter) -> None:
    height, width = data.shape[1:]
    size = max(1, min(64, _PIXELS_AT_ONCE // (height * width)))
    starts = range(0, len(data), size)
    module = autoencoder.module.to(device)
    try:
        with progress(f"encoding {data.name}", len(starts)) as bar:
            for start in starts:
                indices = np.arange(start, min(start + size, len(data)))
                images = torch.from_numpy(data.batch(indices)[0]).to(device)
                latents = autoencoder.encode(images.expand(-1, autoencoder.channels, -1, -1))
                if start == 0:
                    _check_size(data, latents, autoencoder)
                finite = latents.isfinite().flatten(1).all(1).cpu().numpy()
                if not finite.all():
                    raise DataError(
                        f"the autoencoder gives NaN or infinity for image {indices[~finite][0]} of {data.name!r}; "
                        "use another one"
                    )
                writer.append(latents.float().cpu().numpy())
                bar("")
    finally:
        module.to("cpu")


def _check_size(data: ImageData, latents: Tensor, autoencoder: Autoencoder) -> None:
    height, width = data.shape[1:]
    back = tuple(autoencoder.decode(latents[:1]).shape[2:])
    if back != (height, width):
        factor = max(back[0] // latents.shape[2], 1)
        raise DataError(
            f"the autoencoder gives images of {height} x {width} back as {back[0]} x {back[1]}; their sides must be "
            f"multiples of {factor}"
        )


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        inside = next(
            (f.parent.name for f in sorted(folder.glob("*/config.json")) if "vae" in f.parent.name), None
        )
        hint = f"; give {folder / inside}" if inside else ""
        raise DataError(
            f"an autoencoder is a folder with config.json, as diffusers saves it; there is none in {folder}{hint}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise DataError(f"an autoencoder is one of {', '.join(KINDS)}; {folder} holds {kind!r}")
    moments = ("latents_mean", "latents_std")
    if not KINDS[kind].moments and (key := next((k for k in moments if config.get(k) is not None), None)):
        raise DataError(
            f"the autoencoder in {folder} scales each channel by itself ({key}); one scale and shift are supported"
        )
    return config


def _module(folder: Path, kind: str) -> nn.Module:
    try:
        import diffusers  # slow to import, and only autoencoders need it
    except ImportError as error:
        raise MissingExtraError(
            "an autoencoder needs diffusers; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    try:
        module, found = getattr(diffusers, kind).from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"the autoencoder in {folder} cannot be loaded: {error}") from error
    odd = [*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])]
    if odd:  # diffusers would go on with random weights in their place
        raise DataError(
            f"the weights in {folder} are not those of its config.json: {odd[0]} is missing, too many or of another "
            f"shape ({len(odd)} such); copy the folder again"
        )
    return module.eval().requires_grad_(False)
