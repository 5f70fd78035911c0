"""Teachers from elsewhere: SiT and REPA files, pi-Flow's own, diffusers transformers, Python functions; and back."""

import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from piflow_edge.distill.loop.training import TrainingConfig
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import Convention, DiTNetwork, attach_policy_head, describe
from piflow_edge.distill.networks.lora import LoRAConfig
from piflow_edge.distill.networks.sit import load_sit
from piflow_edge.distill.sources import load_student, load_teacher, network_of
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import GuidanceConfig, GuidedTeacher
from piflow_edge.errors import CheckpointError, ScheduleError, ShapeError
from piflow_edge.policies import DXPolicySpec, GMPolicySpec
from tests.helpers.golden_cases import GOLDEN, cases

CHECKPOINTS = GOLDEN / "checkpoints"
SIGMA = torch.tensor([0.9, 0.4])


def golden(name):
    return cases("checkpoint_forward", lambda case: case == name)[0]


# SiT, REPA and pi-Flow's class-conditional networks


def test_a_teacher_of_the_authors_gives_the_recorded_prediction():
    network = load_sit(
        CHECKPOINTS / "teacher_dit" / "model.pth", sample_size=8, style="piflow", num_heads=2, convention=Convention()
    )  # fmt: skip
    case = golden("teacher_dit/in0")
    x_t, t, labels = (torch.from_numpy(case[k]) for k in ("hidden_states", "timestep", "class_labels"))
    with torch.no_grad():
        found = network(x_t, t / 1000, labels=labels)
    case.check("output", found.numpy(), np.float32)


class SiT(nn.Module):
    """A SiT in its own names and its own time: t = 0 is noise, the velocity is x_0 - noise. Sums written out."""

    def __init__(self, width=16, depth=2, heads=2, channels=2, classes=3, learn_sigma=True):
        super().__init__()
        linear = lambda rows: nn.Linear(width, rows)  # noqa: E731
        out = channels * (2 if learn_sigma else 1)
        self.heads, self.out = heads, out
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, 2, stride=2)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, width), requires_grad=False)
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), linear(width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        modulation = lambda parts: nn.Sequential(nn.SiLU(), linear(parts * width))  # noqa: E731
        block = lambda: nn.ModuleDict({  # noqa: E731
            "attn": nn.ModuleDict({"qkv": linear(3 * width), "proj": linear(width)}),
            "mlp": nn.ModuleDict({"fc1": linear(4 * width), "fc2": nn.Linear(4 * width, width)}),
            "adaLN_modulation": modulation(6),
        })  # fmt: skip
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": linear(4 * out), "adaLN_modulation": modulation(2)})
        # Two tokens a side: column, then row, each as sines and cosines of four frequencies.
        waves = [[f(i * 10000 ** (-j / 4)) for f in (np.sin, np.cos) for j in range(4)] for i in range(2)]
        table = [waves[column] + waves[row] for row in range(2) for column in range(2)]
        self.pos_embed.data.copy_(torch.tensor(np.array(table)))

    def forward(self, x, t, y):
        half = torch.exp(-np.log(10000) * torch.arange(128) / 128)
        angles = t[:, None] * half
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))
        c = c + self.y_embedder["embedding_table"](y)
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        norm = lambda v, shift, scale: F.layer_norm(v, v.shape[-1:], eps=1e-6) * (1 + scale) + shift  # noqa: E731
        for block in self.blocks:
            sa, ca, ga, sm, cm, gm = block["adaLN_modulation"](c)[:, None].chunk(6, -1)
            q, k, v = block["attn"]["qkv"](norm(tokens, sa, ca)).chunk(3, -1)
            split = lambda a: a.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731
            weights = (split(q) @ split(k).mT / (q.shape[-1] / self.heads) ** 0.5).softmax(-1)
            tokens = tokens + ga * block["attn"]["proj"]((weights @ split(v)).transpose(1, 2).flatten(2))
            hidden = F.gelu(block["mlp"]["fc1"](norm(tokens, sm, cm)), approximate="tanh")
            tokens = tokens + gm * block["mlp"]["fc2"](hidden)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        rows = self.final_layer["linear"](norm(tokens, shift, scale))
        return torch.einsum("nhwpqc->nchpwq", rows.view(-1, 2, 2, 2, 2, self.out)).reshape(
            len(x), self.out, 4, 4
        )


@pytest.fixture
def sit():
    torch.manual_seed(0)
    return SiT()


@pytest.mark.parametrize("style", ["sit", "repa"])
def test_a_sit_file_gives_its_velocity_in_our_time(sit, tmp_path, style):
    weights = {f"module.{name}": value for name, value in sit.state_dict().items()}
    if style == "repa":
        weights["module.projectors.0.0.weight"] = torch.zeros(3, 3)
    torch.save({"ema": weights, "model": {}, "step": 7}, tmp_path / "sit.pt")
    sign, time = (1, SIGMA) if style == "repa" else (-1, 1 - SIGMA)
    network = load_sit(tmp_path / "sit.pt", sample_size=4, style=style, num_heads=2)
    assert network.null["labels"] == 3
    x_t, labels = torch.randn(2, 2, 4, 4), torch.tensor([1, 3])
    with torch.no_grad():
        expected = sign * sit(x_t, time, labels)[:, :2]
        torch.testing.assert_close(network.velocity(x_t, SIGMA, labels=labels), expected, atol=1e-5, rtol=0)


def test_files_that_are_no_sit_are_refused(sit, tmp_path):
    weights = sit.state_dict()
    with pytest.raises(CheckpointError, match=r"width 16 .*num_heads"):
        load_sit(weights, sample_size=4)
    with pytest.raises(CheckpointError, match=r"\(1, 4, 16\) .* 4 x 4 .*sample_size"):
        load_sit(weights, sample_size=8, num_heads=2)
    with pytest.raises(CheckpointError, match=r"pos_embed\.proj\.weight|not known"):
        load_sit(CHECKPOINTS / "teacher_dit" / "model.pth", sample_size=8, num_heads=2)
    with pytest.raises(CheckpointError, match=r"it lacks 'patch_embed\.weight'"):
        load_sit({}, sample_size=4)
    (tmp_path / "x.pt").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="checkpoint"):
        load_sit(tmp_path / "x.pt", sample_size=4)


# Transformers of diffusers, tiny and random


def _module(name):
    diffusers = pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
    torch.manual_seed(0)
    small = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2)
    rope = dict(axes_dims_rope=(4, 6, 6), joint_attention_dim=24)
    make = {
        "dit": lambda: diffusers.DiTTransformer2DModel(
            **small, in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=10
        ),
        "sd3": lambda: diffusers.SD3Transformer2DModel(
            **small, sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=24, caption_projection_dim=32,
            pooled_projection_dim=20, pos_embed_max_size=8,
        ),
        "flux": lambda: diffusers.FluxTransformer2DModel(
            **small, **rope, in_channels=16, num_single_layers=1, pooled_projection_dim=20, guidance_embeds=True
        ),
        "qwen": lambda: diffusers.QwenImageTransformer2DModel(**small, **rope, in_channels=16, out_channels=4),
    }  # fmt: skip
    return make[name]()


def _network(name):
    from piflow_edge.distill.networks.diffusers_networks import wrap_diffusers

    shape = None if name in ("dit", "sd3") else (4, 6, 8)
    return wrap_diffusers(_module(name), sample_shape=shape).requires_grad_(False)


def _conditioning(name, batch=2):
    if name == "dit":
        return {"labels": torch.arange(batch)}
    text = {"encoder_hidden_states": torch.randn(batch, 5, 24)}
    if name == "qwen":
        return {**text, "encoder_hidden_states_mask": torch.ones(batch, 5, dtype=torch.int64)}
    return {**text, "pooled_projections": torch.randn(batch, 20)}


FAMILIES = ["dit", "sd3", "flux", "qwen"]


@pytest.mark.parametrize("head", [GMPolicySpec(3), DXPolicySpec(2)], ids=["gm", "dx"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_of_a_diffusers_transformer_starts_as_it(name, head, monkeypatch):
    monkeypatch.setattr("piflow_edge.policies.gm.MEAN_SPREAD", 0.0)
    teacher = _network(name)
    nn.init.normal_(teacher.module.get_submodule(teacher.output_layer).weight)
    x_t, conditioning = torch.randn(2, *teacher.sample_shape), _conditioning(name)
    expected = teacher.velocity(x_t, SIGMA, **conditioning)
    assert expected.shape == x_t.shape
    outputs = attach_policy_head(teacher, head)(x_t, SIGMA, **conditioning)
    assert [list(part.shape[1:]) for part in outputs] == head.output_shapes(teacher.sample_shape)
    for component in outputs[0].unbind(1):
        torch.testing.assert_close(component, expected, atol=1e-5, rtol=1e-5)


def test_a_transformer_that_is_not_known_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the 'diffusers' extra")
    from piflow_edge.distill.networks.diffusers_networks import load_diffusers, wrap_diffusers

    with pytest.raises(ShapeError, match=r"UNet2DModel .*DiTTransformer2DModel"):
        wrap_diffusers(diffusers.UNet2DModel(block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                             up_block_types=("UpBlock2D",), norm_num_groups=8))  # fmt: skip
    with pytest.raises(ShapeError, match="runs at any size"):
        wrap_diffusers(_module("flux"))
    with pytest.raises(CheckpointError, match="transformer"):
        load_diffusers(str(tmp_path))


# A run from any source, and its checkpoint read back


def python_teacher():
    """What a user's own module would hold."""
    torch.manual_seed(3)
    network = DiTNetwork(DiTConfig(1, 4, hidden_size=16, depth=1, num_heads=2, num_classes=2))
    nn.init.normal_(network.module.head.out.weight, std=0.2)
    return network


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((16, 1, 4, 4)).astype(np.float32)
    return ImageData("noise", images, ClassLabels(("a", "b")), {"labels": np.arange(16) % 2})


@pytest.fixture
def teacher_folder(tmp_path, data):
    network = python_teacher()
    tensors = {f"ema.{name}": value for name, value in network.state_dict().items()}
    save_checkpoint(
        tmp_path / "teacher",
        Checkpoint("teacher", 0, describe(network), {}, data.conditioner, tensors),
    )
    return tmp_path / "teacher"


def short_run(source, data, folder, **options):
    return distill(
        load_teacher(source, sample_shape=data.shape), data, ImitationConfig(nfe=2, total_substeps=16),
        TrainingConfig(iterations=3, batch_size=4), folder,
        **{"guidance": GuidanceConfig(1.5), "head": GMPolicySpec(2), **options},
    )  # fmt: skip


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("source", ["folder", "function"])
def test_a_student_is_read_back_as_it_was_trained(teacher_folder, data, tmp_path, source, lora, monkeypatch):
    if lora:
        pytest.importorskip("peft", reason="LoRA needs the 'diffusers' extra")
    monkeypatch.setitem(sys.modules, "my_teacher", sys.modules[__name__])
    source = teacher_folder if source == "folder" else "my_teacher:python_teacher"
    trained = short_run(source, data, tmp_path / "student", lora=lora)
    read = load_checkpoint(tmp_path / "student", kind="student")
    assert not any(str(tmp_path) in str(value) for value in read.settings.values())  # no paths in the record
    x_t = torch.from_numpy(data.images[:2])
    a, b = (network_of(c)(x_t, SIGMA, labels=torch.tensor([0, 1])) for c in (trained, read))
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
    if lora:
        full = sum(v.numel() for v in python_teacher().state_dict().values())
        assert sum(v.numel() for v in read.group("ema").values()) < full / 2


def test_a_lora_student_wants_the_teacher_it_had(teacher_folder, data, tmp_path):
    pytest.importorskip("peft", reason="LoRA needs the 'diffusers' extra")
    trained = short_run(teacher_folder, data, tmp_path / "student", lora=LoRAConfig(rank=2))
    checkpoint = load_checkpoint(teacher_folder)
    checkpoint.tensors["ema.module.head.out.bias"] += 1
    save_checkpoint(teacher_folder, checkpoint)
    with pytest.raises(CheckpointError, match=r"teacher .*changed"):
        network_of(trained)


def test_a_source_that_is_none_is_named():
    with pytest.raises(CheckpointError, match=r"FlowNetwork; .*OrderedDict"):
        load_teacher("collections:OrderedDict")
    with pytest.raises(CheckpointError, match=r"StudentModel; .*OrderedDict"):
        load_student("collections:OrderedDict")


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_teachers.py").write_text(
        "def wide(width, depth=2): ...\n"
        "def misspelt(): return [].nothing\n"
        "def adds(): return 'a' + 1\n"
        "def raises(): raise RuntimeError('no such shape')\n"
        "def ours():\n    from piflow_edge.errors import ShapeError\n    raise ShapeError('said well already')\n"
        "number = 3\n"
    )
    (tmp_path / "users_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("users_teachers", "users_broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("entry", "words", "cause"),
    [
        ("users_teachers:wide", r"wide\(width, depth=2\); name", TypeError),
        ("users_teachers:misspelt", "failed: AttributeError: 'list' .*teachers.py, line 2", AttributeError),
        ("users_teachers:adds", r"failed: TypeError: .*teachers.py, line 3\)", TypeError),
        ("users_teachers:raises", "failed: RuntimeError: no such shape", RuntimeError),
        ("users_teachers:number", r"function; .*'number' is a int", None),
        ("users_teachers:missing", r"function; .*'missing' is not there", None),
        ("users_broken:f", "importing users_broken failed: .*'no_such_library'.*broken.py, line 1", ImportError),
        ("no.such.module:make", "no module 'no' to import here; .*PYTHONPATH", ImportError),
        ("C:\\teacher", "neither that nor a file here", None),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_function_of_the_user_s_is_told_as_it_is(users_module, entry, words, cause):
    for load in (load_teacher, load_student):
        with pytest.raises(CheckpointError, match=words) as told:
            load(entry)
        assert isinstance(told.value.__cause__, cause or type(None))


def test_an_error_of_ours_in_a_function_of_the_user_s_stays(users_module):
    with pytest.raises(ShapeError, match=r"^said well already$"):
        load_teacher("users_teachers:ours")


def test_guidance_wants_to_know_what_no_condition_is(data):
    network = python_teacher()
    network.null = {}
    with pytest.raises(ScheduleError, match=r"null condition.* 1"):
        GuidedTeacher(network, GuidanceConfig(2.0))
    x_t, conditioning = torch.randn(2, 1, 4, 4), {"labels": torch.tensor([0, 1]), "other": torch.ones(2, 3)}

    class Both:
        def velocity(self, x_t, sigma_t, labels, other):
            assert torch.equal(other, torch.ones(4, 3))  # what has no null stays
            return labels.float().view(-1, 1, 1, 1).expand_as(x_t)

    guided = GuidedTeacher(Both(), GuidanceConfig(3.0), null={"labels": torch.tensor(2)})
    found = guided.velocity(x_t, 0.5, **conditioning)
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([2.0 + 3 * (0 - 2), 2.0 + 3 * (1 - 2)]))


@pytest.mark.parametrize(("interval", "asked"), [((0.3, 0.7), 3 + 2), ((0.9, 1.0), 3)])
def test_outside_its_interval_guidance_asks_the_network_once(interval, asked):
    network, sizes = python_teacher(), []
    nn.init.normal_(network.module.head.modulation.weight, std=0.5)  # so that classes matter
    network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    x_t, labels = torch.randn(3, *network.sample_shape), torch.tensor([0, 1, 1])
    sigma_t = np.array([0.3, 0.8, 0.5])
    guided = GuidedTeacher(network, GuidanceConfig(2.0, interval)).velocity(x_t, sigma_t, labels=labels)
    assert sizes == [asked]
    everywhere = GuidedTeacher(network, GuidanceConfig(2.0)).velocity(x_t, sigma_t, labels=labels)
    plain = GuidedTeacher(network).velocity(x_t, sigma_t, labels=labels)
    assert not torch.allclose(everywhere, plain, atol=1e-3)
    inside = (sigma_t >= interval[0]) & (sigma_t <= interval[1])
    expected = torch.where(torch.from_numpy(inside).view(-1, 1, 1, 1), everywhere, plain)
    torch.testing.assert_close(guided, expected)


def test_several_numbers_of_calls_are_trained_in_one_student(teacher_folder, data, tmp_path):
    options = dict(guidance=GuidanceConfig(), head=DXPolicySpec(3))
    trained = distill(
        load_teacher(teacher_folder), data, ImitationConfig(nfe=(4, 1, 2), total_substeps=16),
        TrainingConfig(iterations=2, batch_size=8), tmp_path / "student", **options,
    )  # fmt: skip
    assert trained.settings["imitation"]["nfe"] == (1, 2, 4)
    assert trained.network["head"] == {"kind": "dx", **asdict(DXPolicySpec(3, segment_size=1.0))}
    assert ImitationConfig(nfe=(2, 2)).nfe == 2
