"""A FLUX.1 pipeline with an adapter: the bundle's image is the one that diffusers' own parts make."""

import json

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
pytest.importorskip("transformers")

import diffusers
import torch

import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle
from piflow_edge.conditioning import ConditionRequest
from piflow_edge.errors import CheckpointError, ShapeError
from piflow_edge.export.conversions import calibration
from piflow_edge.export.pipelines.pipeline_parts import read_pipeline
from tests.commands.command_line import run
from tests.export.pipelines.fewer_bits import assert_draws_nearly_the_same
from tests.export.pipelines.official_sampling import MixtureTransformer, draw_latents
from tests.export.pipelines.tiny_pipelines import save_flux_pipeline, save_gm_adapter

pytestmark = pytest.mark.torch
PIPELINE = diffusers.FluxPipeline
LORA = ("transformer_blocks.0.ff.net.2", "time_text_embed.timestep_embedder.linear_1",
        "single_transformer_blocks.0.proj_out")  # fmt: skip
PROMPT = "a red apple, 苹果"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pipeline`, an adapter under its published name, and the `bundle` of both."""
    place = tmp_path_factory.mktemp("flux")
    pipeline = save_flux_pipeline(place / "pipeline")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(pipeline / "transformer")
    adapter = save_gm_adapter(place / "gmflux_k8_piid_4step", transformer, "GMFluxTransformer2DModel", LORA)
    command = ["export", "--pipeline", str(pipeline), "--adapter", f"{place}:{adapter.name}", "--size", "16x24",
               "--axis", "height=4:40:2", "--axis", "width=4:40:2", "--json"]  # fmt: skip
    fewer = {"bundle": ["--precision", "fp32,fp16,int4"], "int8": ["--network-precision", "encoder=int8"]}
    with pytest.MonkeyPatch.context() as patch:
        # T5 fills each prompt up to 512 tokens, and 16 prompts would take most of the time.
        patch.setattr(calibration, "CALIBRATION_IMAGES", 2)
        for name, options in fewer.items():
            run(*command, *options, "--out", place / name)
    return place


@pytest.fixture(scope="module")
def transformer(place, pipeline):
    return MixtureTransformer(pipeline.transformer, place / "gmflux_k8_piid_4step")


def draw_with_diffusers(pipeline, transformer, prompt, noise):
    """Encodings, latents and the image that the pipeline's own parts make of a prompt and noise (1, 4, H, W)."""
    rows, columns = noise.shape[2:]
    hidden, pooled, text_ids = pipeline.encode_prompt(prompt, None, max_sequence_length=512)
    image_ids = pipeline._prepare_latent_image_ids(1, rows // 2, columns // 2, "cpu", torch.float32)

    def unpack(part):
        return pipeline._unpack_latents(part, rows * 2, columns * 2, pipeline.vae_scale_factor)

    def predict(x_t, sigma):
        means, logweights, logstds = transformer(
            hidden_states=pipeline._pack_latents(x_t, 1, 4, rows, columns), timestep=torch.tensor([sigma]),
            guidance=torch.tensor([3.5]), pooled_projections=pooled, encoder_hidden_states=hidden,
            txt_ids=text_ids, img_ids=image_ids,
        )  # fmt: skip
        parts = (torch.stack([unpack(part) for part in parts.unbind(2)], 1) for parts in (means, logweights))
        return *parts, logstds.view(1, 1, 1, 1, 1)

    latents = draw_latents(predict, noise)
    config = pipeline.vae.config
    scaled = torch.from_numpy(latents).float() / config.scaling_factor + config.shift_factor
    decoded = pipeline.vae.decode(scaled)[0]
    image = np.rint(pipeline.image_processor.postprocess(decoded, "np") * 255)
    return hidden.numpy(), pooled.numpy(), latents, image


def test_images_of_a_bundle_are_those_of_the_pipeline_at_every_size(place, pipeline, transformer):
    with pf.load(place / "bundle") as generator:
        assert generator.trained_nfes == (4,)
        for size in ((8, 12), (14, 6), (40, 4)):  # traced at another one still
            noise = np.random.default_rng(0).standard_normal((1, 4, *size), np.float32)
            hidden, pooled, latents, image = draw_with_diffusers(pipeline, transformer, PROMPT, noise)
            encodings = generator.conditioner.encode(ConditionRequest(prompts=PROMPT))
            sides = {"height": size[0] * 2, "width": size[1] * 2}
            found = generator(PROMPT, noise=noise, output="numpy", **sides)
            atol = 1e-5 * np.abs(hidden).max()
            np.testing.assert_allclose(encodings["encoder_hidden_states"], hidden, rtol=0, atol=atol)
            np.testing.assert_allclose(encodings["pooled_projections"], pooled, rtol=0, atol=1e-5)
            # Four calls, each answering a state that was rounded to float32.
            np.testing.assert_allclose(found.latents, latents, rtol=0, atol=5e-5 * np.abs(latents).max())
            assert found.images.shape == image.shape and np.abs(found.images.astype(int) - image).max() <= 1


def test_a_size_that_cannot_be_is_refused_with_the_nearest_that_can(place):
    with pf.load(place / "bundle") as generator:
        words = r"8 to 80, a multiple of 4 high .* wide .* got 18x300; the nearest: 16x80 and 20x80"
        with pytest.raises(ShapeError, match=words):
            generator(PROMPT, height=18, width=300)
        made = generator(PROMPT, height=20, seed=2)
        assert made.images[0].size == (24, 20)
        again = generator.make_again(made.recipe)
        assert np.array_equal(again.latents, made.latents) and again.recipe.settings.height == 20
        assert generator.decode(made.latents).shape == (1, 20, 24, 3)


def test_an_image_does_not_depend_on_what_else_is_in_the_batch(place):
    with pf.load(place / "bundle") as generator:
        both = generator(["a cat wearing a hat, and much else besides", PROMPT], seed=0, output="latent")
        alone = generator(PROMPT, seed=[(0, 1)], output="latent")
    np.testing.assert_allclose(alone.latents[0], both.latents[1], rtol=0, atol=1e-5)


def test_a_bundle_says_what_its_student_is_good_for_and_what_it_came_from(place):
    manifest = Bundle(place / "bundle").manifest
    schedule = manifest.schedule
    assert (schedule.good_nfes, schedule.or_more, schedule.substep_rule) == ([4], False, "ceil")
    assert (schedule.shift, schedule.final_step_size_scale, schedule.temperature) == (3.2, 0.5, "auto")
    assert manifest.policy.eps == 1e-6 and manifest.provenance["embedded_guidance"] == 3.5
    assert manifest.provenance["hub_id"] == "Lakonik/pi-FLUX.1:gmflux_k8_piid_4step"
    assert manifest.license == "FLUX.1 [dev] Non-Commercial License"
    assert "black-forest-labs/FLUX.1-dev" in (place / "bundle" / "LICENSE").read_text()


def test_what_cannot_be_exported_is_said_before_the_work(place, tmp_path):
    pipeline, adapter = str(place / "pipeline"), str(place / "gmflux_k8_piid_4step")
    with pytest.raises(CheckpointError, match=r"multiples of 4 .*got 18x24; the nearest are 16x24 and 20x28"):
        read_pipeline(pipeline, adapter, size=(18, 24))
    with pytest.raises(CheckpointError, match=r"model_index\.json"):
        read_pipeline(str(tmp_path), adapter)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "SanaPipeline"}))
    with pytest.raises(CheckpointError, match=r"is a SanaPipeline; .*FluxPipeline"):
        read_pipeline(str(tmp_path), adapter)
    for options in (["--pipeline", pipeline], [pipeline, "--pipeline", pipeline, "--adapter", adapter], []):
        refused = run("export", *options, "--out", tmp_path / "out", code=2)
        assert "--pipeline" in refused.stderr


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_fewer_bits_draw_nearly_what_fp32_does(place, precision):
    with pf.load(place / "bundle") as exact, pf.load(place / "bundle", precision=precision) as generator:
        assert_draws_nearly_the_same(generator, exact, [PROMPT, "a cat"], precision, precision)


def test_text_encoders_in_int8_steer_nearly_as_in_fp32(place):
    with pf.load(place / "bundle") as exact, pf.load(place / "int8") as generator:
        assert_draws_nearly_the_same(generator, exact, [PROMPT, "a cat"], "int8", "int8")
