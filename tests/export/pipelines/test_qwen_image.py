"""A Qwen-Image pipeline with an adapter: masks, dropped tokens of the template, latents scaled channel by channel."""

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
pytest.importorskip("transformers")

import diffusers
import torch

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.export.pipelines.pipeline_parts import read_pipeline
from piflow_edge.export.to_bundle import export_bundle
from tests.export.pipelines.fewer_bits import assert_draws_nearly_the_same
from tests.export.pipelines.official_sampling import MixtureTransformer, draw_latents
from tests.export.pipelines.tiny_pipelines import save_gm_adapter, save_qwen_pipeline

pytestmark = pytest.mark.torch
PIPELINE = diffusers.QwenImagePipeline
LORA = ("transformer_blocks.0.img_mlp.net.2", "time_text_embed.timestep_embedder.linear_1")
PROMPTS = ["a red apple", "a cat wearing a hat, 苹果, numbers 0123"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pipeline`, an adapter under its published name, and the `bundle` of both."""
    place = tmp_path_factory.mktemp("qwen")
    pipeline = save_qwen_pipeline(place / "pipeline")
    transformer = diffusers.QwenImageTransformer2DModel.from_pretrained(pipeline / "transformer")
    adapter = save_gm_adapter(
        place / "gmqwen_k8_piid_4step", transformer, "GMQwenImageTransformer2DModel", LORA
    )
    parts = read_pipeline(str(pipeline), str(adapter), size=(16, 24))
    networks = {"autoencoder": parts.autoencoder, "encoders": parts.encoders}
    export_bundle(parts.student, place / "bundle", precisions=("fp32", "fp16", "int4"), **networks)
    # Beside a student in fp32: what steers it is all that differs.
    export_bundle(parts.student, place / "int8", network_precisions={"encoder": "int8"}, **networks)
    return place


def draw_with_diffusers(pipeline, transformer, prompt, noise):
    """Encodings, latents and the image that the pipeline's own parts make of a prompt and noise (1, 4, H, W)."""
    rows, columns = noise.shape[2:]
    hidden, mask = pipeline.encode_prompt(prompt, max_sequence_length=512)
    factor = pipeline.vae_scale_factor

    def unpack(part):
        return pipeline._unpack_latents(part, rows * factor, columns * factor, factor)[:, :, 0]

    def predict(x_t, sigma):
        means, logweights, logstds = transformer(
            hidden_states=pipeline._pack_latents(x_t, 1, 4, rows, columns), timestep=torch.tensor([sigma]),
            encoder_hidden_states=hidden, encoder_hidden_states_mask=mask, img_shapes=[[(1, rows // 2, columns // 2)]],
        )  # fmt: skip
        parts = (torch.stack([unpack(part) for part in parts.unbind(2)], 1) for parts in (means, logweights))
        return *parts, logstds.view(1, 1, 1, 1, 1)

    latents = draw_latents(predict, noise)
    config = pipeline.vae.config
    mean, deviation = (
        torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    decoded = pipeline.vae.decode(torch.from_numpy(latents).float()[:, :, None] * deviation + mean)[0][
        :, :, 0
    ]
    return hidden.numpy(), latents, np.rint(pipeline.image_processor.postprocess(decoded, "np") * 255)


def test_images_of_a_bundle_are_those_of_the_pipeline_whatever_else_is_drawn(place, pipeline):
    transformer = MixtureTransformer(pipeline.transformer, place / "gmqwen_k8_piid_4step")
    with pf.load(place / "bundle") as generator:
        for size in ((8, 12), (14, 10)):
            noise = np.random.default_rng(0).standard_normal((2, 4, *size), np.float32)
            sides = {"height": size[0] * 2, "width": size[1] * 2}
            found = generator(PROMPTS, noise=noise, output="numpy", **sides)  # of other lengths, in one batch
            for i, prompt in enumerate(PROMPTS):
                hidden, latents, image = draw_with_diffusers(pipeline, transformer, prompt, noise[i : i + 1])
                encodings = generator.conditioner.encode(ConditionRequest(prompts=prompt))
                atol = 1e-5 * np.abs(hidden).max()
                np.testing.assert_allclose(encodings["encoder_hidden_states"], hidden, rtol=0, atol=atol)
                atol = 5e-5 * np.abs(latents).max()
                np.testing.assert_allclose(found.latents[i : i + 1], latents, rtol=0, atol=atol)
                assert np.abs(found.images[i : i + 1].astype(int) - image).max() <= 1


def test_its_student_is_good_for_four_calls_or_more(place):
    manifest = Bundle(place / "bundle").manifest
    assert manifest.schedule.describe_good_nfes() == "4 or more"
    assert manifest.latent.mean == [0.1, -0.2, 0.3, 0.0] and manifest.latent.deviation == [1.5, 0.7, 2.0, 1.1]
    assert manifest.provenance["embedded_guidance"] is None


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_fewer_bits_draw_nearly_what_fp32_does(place, precision):
    with pf.load(place / "bundle") as exact, pf.load(place / "bundle", precision=precision) as generator:
        assert_draws_nearly_the_same(generator, exact, PROMPTS, precision, precision)


def test_a_text_encoder_in_int8_steers_nearly_as_in_fp32(place):
    with pf.load(place / "bundle") as exact, pf.load(place / "int8") as generator:
        assert_draws_nearly_the_same(generator, exact, PROMPTS, "int8", "int8")
