"""Transformers of diffusers as flow networks: DiT, SD3, FLUX.1 and .2, Qwen-Image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from piflow_edge.distill.official.hub import check_on_hub, check_there, explain_failure, find_local
from piflow_edge.distill.stored_weights import find_stored_type, leave_in_files
from piflow_edge.errors import CheckpointError, MissingExtraError, ShapeError

from .flow_network import Convention, FlowNetwork
from .rotations import count_places, use_real_rotations

# Side of the patches that FLUX and Qwen-Image are given as tokens.
_PACKED = 2


class DiffusersNetwork(FlowNetwork):
    """A transformer of diffusers that takes and returns states (B, C, H, W).

    Args:
        module: the transformer.
        convention: None is that of the class as published; a `DiTTransformer2DModel` counts to 1000 and is taken to
            predict velocity, which the published ones, noise predictors of another diffusion, do not.
        sample_shape: (C, H, W); None is what the transformer's configuration says.
    """

    family = "diffusers"
    packed = False

    def __init__(
        self, module, sample_shape: tuple[int, ...] | None = None, convention: Convention | None = None
    ):
        super().__init__(
            module,
            sample_shape or self._configured_shape(module),
            convention or self.published,
            output_layer=self.output,
            channel_major=self.packed,
            planes=self._planes(module),
            null=self._null(module),
        )

    # Of the class: name of the output layer, and the convention of the published weights.
    output = "proj_out"
    published = Convention()

    def describe(self):
        """See `FlowNetwork.describe`."""
        config = {k: v for k, v in dict(self.module.config).items() if not k.startswith("_")}
        return {
            "class": type(self.module).__name__,
            "config": config,
            "convention": vars(self.convention).copy(),
        }

    @staticmethod
    def _configured_shape(module) -> tuple[int, ...]:
        size = module.config.sample_size
        return (module.config.in_channels, size, size)

    def _planes(self, module) -> int:
        return module.out_channels

    @staticmethod
    def _null(module) -> dict[str, Tensor]:
        return {}


class DiTDiffusersNetwork(DiffusersNetwork):
    """`DiTTransformer2DModel`: conditioning `labels` (B,)."""

    output = "proj_out_2"
    inputs, optional_inputs = ("labels",), ()

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        return self.module(x_t, timestep=t, class_labels=conditioning["labels"], return_dict=False)[0]

    @staticmethod
    def _null(module):
        return {"labels": torch.tensor(module.config.num_embeds_ada_norm)}


class SD3DiffusersNetwork(DiffusersNetwork):
    """`SD3Transformer2DModel`: conditioning `encoder_hidden_states` (B, L, D), `pooled_projections` (B, D)."""

    inputs, optional_inputs = ("encoder_hidden_states", "pooled_projections"), ()

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        return self.module(x_t, timestep=t, **conditioning, return_dict=False)[0]


class _PackedNetwork(DiffusersNetwork):
    """Tokens are 2 x 2 patches, channel by channel: packed and unpacked here, not by the transformer."""

    packed = True
    published = Convention(num_timesteps=1.0)

    def expect_planes(self, planes):
        """See `FlowNetwork.expect_planes`; the transformer leaves the putting together to us."""

    def predict(self, x_t, t, conditioning):
        """See `FlowNetwork.predict`."""
        tokens, grid = pack(x_t)
        return unpack(self.predict_tokens(tokens, t, grid, conditioning), grid)

    def _planes(self, module):
        return module.get_submodule(self.output).out_features // _PACKED**2

    def embed_time(self, x_t: Tensor, t: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The embedding of time, and of what joins it, that modulates the output layer, (B, D)."""
        raise NotImplementedError

    def predict_tokens(
        self, tokens: Tensor, t: Tensor, grid: tuple[int, int], conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """Tokens (B, rows columns, 4 C) -> tokens (B, rows columns, 4 M)."""
        raise NotImplementedError


class FluxDiffusersNetwork(_PackedNetwork):
    """`FluxTransformer2DModel`: conditioning as SD3's.

    One that was distilled for guidance is told a scale: `guidance_embedding`, unless `guidance` (B,) is given.
    """

    inputs, optional_inputs = ("encoder_hidden_states", "pooled_projections"), ("guidance",)
    guidance_embedding = 3.5  # that of the released FLUX.1 dev pipeline

    @property
    def input_guidance(self):
        """See `FlowNetwork.input_guidance`."""
        return self.guidance_embedding if self.module.config.guidance_embeds else None

    def predict_tokens(self, tokens, t, grid, conditioning):
        """See `_PackedNetwork.predict_tokens`."""
        rows, columns = grid
        row, column = (place.to(tokens) for place in count_places(rows, columns, tokens.device))
        image_ids = torch.stack([torch.zeros_like(row), row, column], dim=1)
        text_ids = tokens.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3)
        conditioning = {**self.tell_guidance(t), **conditioning}
        return self.module(
            tokens, timestep=t, img_ids=image_ids, txt_ids=text_ids, **conditioning, return_dict=False
        )[0]

    def tell_guidance(self, t: Tensor) -> dict[str, Tensor]:
        """The scale that the network's guidance embedding is told at times (B,); nothing where it has none."""
        scale = self.input_guidance
        return {} if scale is None else {"guidance": torch.full_like(t, scale)}

    def embed_time(self, x_t, t, conditioning):
        """See `_PackedNetwork.embed_time`."""
        told = {**self.tell_guidance(t), **conditioning}
        scales = [told["guidance"].to(x_t) * 1000] if "guidance" in told else []
        return self.module.time_text_embed(t.to(x_t) * 1000, *scales, told["pooled_projections"])


class Flux2DiffusersNetwork(FluxDiffusersNetwork):
    """`Flux2Transformer2DModel`: conditioning `encoder_hidden_states` (B, L, D); guidance as FLUX.1's."""

    inputs = ("encoder_hidden_states",)
    guidance_embedding = 4.0  # that of the FLUX.2 dev pipeline

    def predict_tokens(self, tokens, t, grid, conditioning):
        """See `_PackedNetwork.predict_tokens`."""
        rows, columns = grid
        row, column = (place.to(tokens) for place in count_places(rows, columns, tokens.device))
        none = torch.zeros_like(row)
        word = torch.arange(conditioning["encoder_hidden_states"].shape[1], device=tokens.device).to(tokens)
        nowhere = torch.zeros_like(word)
        return self.module(
            tokens,
            timestep=t,
            img_ids=torch.stack([none, row, column, none], dim=1),
            txt_ids=torch.stack([nowhere, nowhere, nowhere, word], dim=1),
            **{**self.tell_guidance(t), **conditioning},
            return_dict=False,
        )[0]

    def embed_time(self, x_t, t, conditioning):
        """See `_PackedNetwork.embed_time`."""
        told = {**self.tell_guidance(t), **conditioning}
        scale = told["guidance"].to(x_t) * 1000 if "guidance" in told else None
        return self.module.time_guidance_embed(t.to(x_t) * 1000, scale)


class QwenImageDiffusersNetwork(_PackedNetwork):
    """`QwenImageTransformer2DModel`: `encoder_hidden_states` (B, L, D), `encoder_hidden_states_mask` (B, L)."""

    inputs, optional_inputs = ("encoder_hidden_states", "encoder_hidden_states_mask"), ()

    def __init__(
        self, module, sample_shape: tuple[int, ...] | None = None, convention: Convention | None = None
    ):
        super().__init__(module, sample_shape, convention)
        use_real_rotations(module)

    def predict_tokens(self, tokens, t, grid, conditioning):
        """See `_PackedNetwork.predict_tokens`."""
        # diffusers would make a number of the mask's length, which a graph then had for ever.
        masks = {"text_mask": conditioning["encoder_hidden_states_mask"]}
        return self.module(
            tokens,
            timestep=t,
            img_shapes=[[(1, *grid)]],
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            attention_kwargs=masks,
            return_dict=False,
        )[0]

    def embed_time(self, x_t, t, conditioning):
        """See `_PackedNetwork.embed_time`."""
        return self.module.time_text_embed(t.to(x_t), x_t)


_NETWORKS = {
    "DiTTransformer2DModel": DiTDiffusersNetwork,
    "SD3Transformer2DModel": SD3DiffusersNetwork,
    "FluxTransformer2DModel": FluxDiffusersNetwork,
    "Flux2Transformer2DModel": Flux2DiffusersNetwork,
    "QwenImageTransformer2DModel": QwenImageDiffusersNetwork,
}


def wrap_diffusers(
    module, *, sample_shape: tuple[int, ...] | None = None, convention: Convention | None = None
) -> DiffusersNetwork:
    """A transformer of diffusers as a flow network; see `DiffusersNetwork`.

    Raises:
        ShapeError: a class that is not known here, or one whose configuration does not say the size of its states.
    """
    kind = type(module).__name__
    if kind not in _NETWORKS:
        raise ShapeError(
            f"{kind} is not known here, only {', '.join(_NETWORKS)}; wrap it as a ModuleNetwork that takes and "
            "returns states"
        )
    if issubclass(_NETWORKS[kind], _PackedNetwork) and sample_shape is None:
        raise ShapeError(f"{kind} runs at any size; give the states' shape, (C, H, W)")
    return _NETWORKS[kind](module, sample_shape, convention)


def load_diffusers(
    source: str,
    *,
    sample_shape: tuple[int, ...] | None = None,
    convention: Convention | None = None,
    dtype: torch.dtype = torch.float32,
) -> DiffusersNetwork:
    """A transformer from a local folder or a hub id; of a whole pipeline its transformer.

    Raises:
        CheckpointError: nothing there that diffusers can read.
        ShapeError: see `wrap_diffusers`.
        MissingExtraError: diffusers is not installed.
    """
    check_there(source)
    try:
        diffusers = _diffusers()
    except MissingExtraError as error:
        if find_local(source) is not None:
            raise
        raise MissingExtraError(f"there is nothing at {source} here; if it is on the hub: {error}") from error
    check_on_hub(source, "a transformer of diffusers")
    folder = Path(source)
    inside = {"subfolder": "transformer"} if (folder / "transformer").is_dir() else {}
    try:
        load = diffusers.AutoModel.from_pretrained  # pyright: ignore[reportPrivateImportUsage]  # made late
        module = load(source, torch_dtype=dtype, **inside)
    except Exception as error:  # diffusers and the hub raise many kinds
        raise explain_failure(source, "a transformer of diffusers", error) from error
    return wrap_diffusers(module, sample_shape=sample_shape, convention=convention).requires_grad_(False)


def load_module(folder: Path, class_name: str) -> nn.Module:
    """A transformer of a certain class from its folder, its large weights left there; see `stored_weights`.

    Raises:
        CheckpointError: nothing there that diffusers can read as one.
        MissingExtraError: diffusers is not installed.
    """
    kind = getattr(_diffusers(), class_name)
    try:
        module = kind.from_pretrained(folder, torch_dtype=find_stored_type(folder), local_files_only=True)
    except Exception as error:  # diffusers raises many kinds
        raise CheckpointError(f"diffusers cannot load a {class_name} from {folder}: {error}") from error
    leave_in_files(module)
    return module


def build_diffusers(description: Mapping[str, Any]) -> DiffusersNetwork:
    """The network that `DiffusersNetwork.describe` described, with weights of no meaning."""
    module = getattr(_diffusers(), description["class"]).from_config(description["config"])
    return wrap_diffusers(
        module,
        sample_shape=tuple(description["sample_shape"]),
        convention=Convention(**description["convention"]),
    )


def pack(x_t: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """States (B, C, H, W) -> tokens (B, H/2 W/2, 4 C), features in the order (C, 2, 2); and the token grid.

    Raises:
        ShapeError: height or width is odd.
    """
    if x_t.ndim != 4 or x_t.shape[2] % _PACKED or x_t.shape[3] % _PACKED:
        raise ShapeError(f"states must be (B, C, H, W) with even sides; got {tuple(x_t.shape)}")
    patches = x_t.unflatten(3, (-1, _PACKED)).unflatten(2, (-1, _PACKED))  # (B, C, rows, 2, columns, 2)
    grid = (patches.shape[2], patches.shape[4])
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), grid


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The way back of `pack`, for any number of planes."""
    patches = tokens.unflatten(2, (-1, _PACKED, _PACKED)).unflatten(1, grid)  # (B, rows, columns, M, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError(
            "a transformer of diffusers needs 'diffusers'; get it with: pip install 'piflow-edge[diffusers]'"
        ) from error
    return diffusers
