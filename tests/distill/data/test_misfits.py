"""Teachers and data that do not fit, and paths where nothing is: one clear error before anything is trained."""

import numpy as np
import pytest

from piflow_edge.distill.configs import GuidanceConfig, ImitationConfig, TrainingConfig
from piflow_edge.distill.data.datasets import load_images
from piflow_edge.distill.sources import load_teacher
from piflow_edge.distill.student import describe_guidance, distill
from piflow_edge.errors import CheckpointError, DataError
from piflow_edge.policies import GMPolicySpec

pytestmark = pytest.mark.torch
COUNT = 4
RANDOM = np.random.default_rng(0)
TEXT = RANDOM.standard_normal((COUNT, 5, 8)).astype(np.float32)
POOLED = RANDOM.standard_normal((COUNT, 8)).astype(np.float32)


@pytest.fixture(scope="module", params=[True, False], ids=["guidance embedded", "no guidance"])
def flux(request, tmp_path_factory):
    """A folder with a tiny transformer of FLUX, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("flux")
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2)
    widths = dict(in_channels=16, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))
    network = diffusers.FluxTransformer2DModel(patch_size=1, guidance_embeds=request.param, **sizes, **widths)
    network.save_pretrained(folder)
    return folder


def run(teacher, folder, **arrays):
    latents = RANDOM.standard_normal((COUNT, 4, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", latents=latents, scale=1.0, shift=0.0, **arrays)
    data = load_images(str(folder / "data.npz"))
    loaded = load_teacher(teacher, sample_shape=data.shape)
    training = TrainingConfig(iterations=1, batch_size=2)
    settings = dict(guidance=GuidanceConfig(), head=GMPolicySpec(2))
    return distill(loaded, data, ImitationConfig(), training, folder / "run", **settings)


def test_flux_is_distilled_with_default_options(flux, tmp_path, capsys):
    found = run(flux, tmp_path, cond_encoder_hidden_states=TEXT, cond_pooled_projections=POOLED)
    assert found.settings["guidance"]["scale"] == 1.0
    assert capsys.readouterr().err.count("the teacher is not guided") == 1


def test_the_first_line_says_what_guidance_a_network_reads():
    assert describe_guidance(1.0, 3.5) == "the teacher is not guided, and reads guidance 3.5 as an input"
    assert describe_guidance(1.5, None) == "the teacher is guided by 1.5"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.arange(COUNT)}, "'encoder_hidden_states', 'pooled_projections'.*cond_NAME"),
        ({"captions": np.array(list("abcd"))}, "give --text-encoder"),
        ({"cond_encoder_hidden_states": TEXT}, "steered by 'pooled_projections', which is not there"),
        (
            {"cond_encoder_hidden_states": TEXT, "cond_pooled_projections": POOLED, "cond_odd": POOLED},
            "no input 'odd'; it takes encoder_hidden_states",
        ),
        (
            {"cond_encoder_hidden_states": TEXT[..., :7], "cond_pooled_projections": POOLED},
            r"encoder_hidden_states \(2, 5, 7\).*give data of the shapes",
        ),
    ],
    ids=["labels", "captions", "missing", "unknown", "width"],
)
def test_data_that_do_not_steer_a_text_teacher_are_refused(flux, tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        run(flux, tmp_path, **arrays)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["techer", "runs/techer", "runs/techer.pt", "./runs/techer"])
def test_a_misspelt_teacher_is_said_not_to_be_there(source, tmp_path, monkeypatch):
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is nothing at .*techer.*there is teacher"):
        load_teacher(source, sample_shape=(3, 8, 8))


def write_one_array(path):
    with path.open("wb") as file:  # np.save would add .npy to a name
        np.save(file, np.zeros(2))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: np.savez(file, images=np.zeros((2, 4, 4), np.uint8)), r"np\.zeros\(number of images"),
        (lambda file: file.write_bytes(b""), "another kind of file, or empty"),
        (lambda file: file.write_bytes(b"PK\x03\x04cut"), "damaged or cut off"),
        (write_one_array, r"one array, an \.npy"),
        (lambda file: np.savez(file, images=np.array([None])), "Python objects"),
    ],
    ids=["unlabelled", "empty", "cut", "npy", "objects"],
)
def test_an_npz_that_cannot_be_used_says_what_to_do(tmp_path, write, message):
    write(tmp_path / "a.npz")
    with pytest.raises(DataError, match=message) as raised:
        load_images(str(tmp_path / "a.npz"))
    assert "allow_pickle" not in str(raised.value)
