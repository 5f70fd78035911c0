"""A FLUX.2 pipeline with an adapter: three hidden layers joined, a chat template, latents of batch-norm statistics."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
pytest.importorskip("transformers")

import diffusers
import torch

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.export.pipelines import pipeline_families
from piflow_edge.export.pipelines.pipeline_parts import read_pipeline
from piflow_edge.export.to_bundle import export_bundle
from tests.export.pipelines.official_sampling import MixtureTransformer, draw_latents
from tests.export.pipelines.tiny_pipelines import FLUX_2_LAYERS, save_flux_2_pipeline, save_gm_adapter

pytestmark = pytest.mark.torch
PIPELINE = diffusers.Flux2Pipeline
LORA = ("transformer_blocks.0.ff.linear_out", "time_guidance_embed.timestep_embedder.linear_1")
PROMPT = "a red apple, 苹果"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pipeline`, an adapter under its published name, and the `bundle` of both."""
    place = tmp_path_factory.mktemp("flux2")
    pipeline = save_flux_2_pipeline(place / "pipeline")
    transformer = diffusers.Flux2Transformer2DModel.from_pretrained(pipeline / "transformer")
    adapter = save_gm_adapter(
        place / "gmflux2_k8_piid_4step", transformer, "GMFlux2Transformer2DModel", LORA, bias=False
    )
    family = pipeline_families.FAMILIES["Flux2Pipeline"]
    (encoder,) = family.encoders
    small = replace(encoder, settings={**encoder.settings, "layers": FLUX_2_LAYERS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pipeline_families.FAMILIES, "Flux2Pipeline", replace(family, encoders=(small,)))
        parts = read_pipeline(str(pipeline), str(adapter), size=(16, 24))
    export_bundle(parts.student, place / "bundle", autoencoder=parts.autoencoder, encoders=parts.encoders)
    return place


def draw_with_diffusers(pipeline, transformer, noise):
    """Encodings, latents and the image that the pipeline's own parts make of the prompt and noise (1, 4, H, W)."""
    rows, columns = (side // 2 for side in noise.shape[2:])
    hidden, text_ids = pipeline.encode_prompt(PROMPT, text_encoder_out_layers=FLUX_2_LAYERS)

    def unpack(part):
        return pipeline._unpatchify_latents(part.permute(0, 2, 1).unflatten(2, (rows, columns)))

    def predict(x_t, sigma):
        patches = pipeline._patchify_latents(x_t)
        means, logweights, logstds = transformer(
            hidden_states=pipeline._pack_latents(patches), timestep=torch.tensor([sigma]), guidance=torch.tensor([4.0]),
            encoder_hidden_states=hidden, txt_ids=text_ids, img_ids=pipeline._prepare_latent_ids(patches),
        )  # fmt: skip
        parts = (torch.stack([unpack(part) for part in parts.unbind(2)], 1) for parts in (means, logweights))
        return *parts, logstds.view(1, 1, 1, 1, 1)

    latents = draw_latents(predict, noise)
    statistics, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    mean, deviation = (
        statistics.running_mean.view(1, -1, 1, 1),
        (statistics.running_var + eps).sqrt().view(1, -1, 1, 1),
    )
    patches = pipeline._patchify_latents(torch.from_numpy(latents).float()) * deviation + mean
    decoded = pipeline.vae.decode(pipeline._unpatchify_latents(patches))[0]
    return hidden.numpy(), latents, np.rint(pipeline.image_processor.postprocess(decoded, "np") * 255)


def test_images_of_a_bundle_are_those_of_the_pipeline(place, pipeline):
    transformer = MixtureTransformer(pipeline.transformer, place / "gmflux2_k8_piid_4step")
    with pf.load(place / "bundle") as generator:
        for size in ((8, 12), (14, 10)):
            noise = np.random.default_rng(0).standard_normal((1, 4, *size), np.float32)
            hidden, latents, image = draw_with_diffusers(pipeline, transformer, noise)
            found = generator(PROMPT, noise=noise, output="numpy", height=size[0] * 2, width=size[1] * 2)
            encodings = generator.conditioner.encode(ConditionRequest(prompts=PROMPT))
            atol = 1e-5 * np.abs(hidden).max()
            np.testing.assert_allclose(encodings["encoder_hidden_states"], hidden, rtol=0, atol=atol)
            np.testing.assert_allclose(found.latents, latents, rtol=0, atol=5e-5 * np.abs(latents).max())
            assert np.abs(found.images.astype(int) - image).max() <= 1


def test_its_guidance_is_the_one_that_it_needs(place):
    manifest = Bundle(place / "bundle").manifest
    assert manifest.provenance["embedded_guidance"] == 4.0
    assert manifest.schedule.describe_good_nfes() == "4 or more"
