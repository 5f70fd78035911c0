"""What every test file shares: the array libraries a formula is tried in, and a small student."""

import importlib.util
import os

import numpy as np
import pytest

# Tests that import onnxruntime themselves send nothing either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
HAS_TORCH = importlib.util.find_spec("torch") is not None
collect_ignore = [] if HAS_TORCH else ["distill", "export"]


class Library:
    """An array library as a test needs it: arrays in, NumPy out."""

    def __init__(self, name):
        self.name = name

    def array(self, value):
        if self.name == "torch":
            import torch

            return torch.from_numpy(np.array(value))
        return np.asarray(value)

    def numpy(self, value):
        return value.numpy() if self.name == "torch" else value


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """No test reads or fills the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folder_of_all_workers(tmp_path_factory):
    """One folder for the whole test run, of however many processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def exports_made_once(request, folder_of_all_workers):
    """See `kept_exports`. Tests that need no torch do not load it for this."""
    if not any(
        item.get_closest_marker("torch") or "export" in item.path.parts for item in request.session.items
    ):
        yield
        return
    from tests.helpers.kept_exports import kept_exports

    with kept_exports(folder_of_all_workers):
        yield


@pytest.fixture(params=["numpy", pytest.param("torch", marks=pytest.mark.torch)])
def library(request):
    if request.param == "torch":
        pytest.importorskip("torch", reason="torch is not installed; the NumPy half of this test runs")
    return Library(request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def make_autoencoder(kind, folder, *, seed=0, **settings):
    """An autoencoder of random weights that halves the side of an image, as diffusers saves one."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    if kind == "AutoencoderKL":
        blocks = dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
        )
        settings = blocks | dict(scaling_factor=0.3611, shift_factor=0.1159) | settings
    else:
        widths = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
        counts = {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
        settings = widths | counts | settings
    getattr(diffusers, kind)(**settings).save_pretrained(folder)
    return folder


def make_student(*, nfe=2, seed=0, head=None, class_names=tuple("0123456789"), latent=None, **architecture):
    """A student of a few thousand weights that was never trained, as a checkpoint."""
    import torch

    from piflow_edge.conditioning import ClassLabels
    from piflow_edge.distill.loop.checkpoint import Checkpoint
    from piflow_edge.distill.networks.dit import DiTConfig
    from piflow_edge.distill.networks.flow_network import DiTNetwork, attach_policy_head, describe
    from piflow_edge.policies import GMPolicySpec

    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, depth=1, num_heads=2, num_classes=len(class_names)) | architecture
    teacher = DiTNetwork(DiTConfig(**sizes))
    last = teacher.module.head
    torch.nn.init.normal_(last.out.weight, std=0.2)  # adaLN-zero starts at 0, where bugs hide
    torch.nn.init.normal_(last.modulation.weight, std=0.2)
    student = attach_policy_head(teacher, head or GMPolicySpec(3), seed=seed)
    settings = {
        "imitation": dict(nfe=nfe, shift=1.0, final_step_size_scale=1.0, total_substeps=128),
        "guidance": {"scale": 1.5, "interval": None, "orthogonal": 0.0},
    }
    settings |= {"latent": latent} if latent else {}
    tensors = {f"ema.{name}": value for name, value in student.state_dict().items()}
    return Checkpoint("student", 0, describe(student), settings, ClassLabels(class_names), tensors)


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory):
    """A small student, exported once. Tests that change files use `bundle` instead."""
    pytest.importorskip("torch", reason="making a bundle needs the 'train' extra")
    from piflow_edge.export.to_bundle import export_bundle

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(make_student(), folder)
    return folder


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory):
    """A small AutoencoderKL."""
    pytest.importorskip("diffusers", reason="autoencoders need the 'diffusers' extra")
    return make_autoencoder("AutoencoderKL", tmp_path_factory.mktemp("autoencoders") / "kl")


@pytest.fixture(scope="session")
def latent_bundle(autoencoder_folder, tmp_path_factory):
    """A small student of latents with its decoder, and a sampler graph of 2 calls. Not to be altered."""
    from piflow_edge.distill.data.autoencoder import load_autoencoder
    from piflow_edge.export.to_bundle import export_bundle

    autoencoder = load_autoencoder(autoencoder_folder)
    student = make_student(latent=vars(autoencoder.latent), in_channels=autoencoder.latent_channels)
    folder = tmp_path_factory.mktemp("bundles") / "latent"
    export_bundle(student, folder, autoencoder=autoencoder, samplers=[2])
    return folder


@pytest.fixture
def bundle(shared_bundle, tmp_path):
    """A copy of the small bundle, to be altered."""
    import shutil

    return shutil.copytree(shared_bundle, tmp_path / "tiny")
