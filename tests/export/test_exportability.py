"""What cannot be exported is refused before it is trained."""

import numpy as np
import pytest
from torch import nn

from piflow_edge.conditioning import Unconditional
from piflow_edge.distill.configs import GuidanceConfig
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.training import TrainingConfig
from piflow_edge.distill.networks.flow_network import (
    Convention,
    FlowNetwork,
    ModuleNetwork,
    attach_policy_head,
)
from piflow_edge.distill.networks.lora import LoRAConfig
from piflow_edge.distill.sources import StudentModel, TeacherModel, student_from_checkpoint
from piflow_edge.distill.student import distill
from piflow_edge.errors import BundleError, CheckpointError
from piflow_edge.export.exportability import check_exportable
from piflow_edge.policies import GMPolicySpec
from tests.conftest import make_student
from tests.export.test_text_bundle import make_text_student
from tests.export.test_unconditional import make_plain_student

pytestmark = pytest.mark.torch


class Branch(nn.Module):
    """A value of its input decides which code runs."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        if x.mean() > 0:
            x = x * 2
        return self.layer(x)


def branch():
    return ModuleNetwork(Branch(), (1, 8, 8), entry=f"{__name__}:branch")


class OwnFamily(FlowNetwork):
    family = "own"

    def predict(self, x_t, t, conditioning):
        return self.module(x_t, t)

    def describe(self):
        return {}


def start(network, folder, **settings):
    """Distil for one step, as `piflow-edge distill` does."""
    settings = {"head": GMPolicySpec(2), "imitation": ImitationConfig()} | settings
    return distill(
        TeacherModel(network, None, {}),
        ImageData("black", np.zeros((4, 1, 8, 8), np.uint8), Unconditional(), {}),
        settings.pop("imitation"),
        TrainingConfig(iterations=1, batch_size=2),
        folder,
        guidance=GuidanceConfig(1.0),
        check=check_exportable,
        **settings,
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: student_from_checkpoint(make_student()),
        make_text_student,
        lambda: student_from_checkpoint(make_plain_student()),
    ],
)
def test_students_that_can_be_exported_pass(make):
    check_exportable(make())


@pytest.mark.parametrize(
    "student, problem",
    [
        (dict(nfe=300), "nfe 300 in its schedule, which lies from 1 to 256"),
        (dict(head=GMPolicySpec(5000)), "num_components 5000"),
        (dict(class_names=tuple(f"{i:0600d}" for i in range(2000))), "fewer or shorter names"),
    ],
)
def test_numbers_and_names_that_no_bundle_may_have_are_refused(student, problem):
    with pytest.raises(BundleError, match=problem):
        check_exportable(student_from_checkpoint(make_student(**student)))


def test_a_run_does_not_begin_where_its_student_could_not_be_exported(tmp_path):
    with pytest.raises(CheckpointError, match=r"test_exportability.py, line \d+.*same way for every\s+input"):
        start(branch(), tmp_path / "run")
    with pytest.raises(BundleError, match="total_substeps 20000"):
        start(branch(), tmp_path / "run", imitation=ImitationConfig(total_substeps=20000))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "network, lora, problem",
    [
        (lambda: ModuleNetwork(Branch(), (1, 8, 8)), None, "package.module:function"),
        (lambda: OwnFamily(Branch(), (1, 8, 8), Convention(), output_layer="layer"), None, "got 'own'"),
        (branch, LoRAConfig(2), "needs its teacher"),
    ],
)
def test_a_run_does_not_begin_where_its_checkpoint_could_not_be_read(tmp_path, network, lora, problem):
    with pytest.raises(CheckpointError, match=problem):
        start(network(), tmp_path / "run", lora=lora)
    assert not (tmp_path / "run").exists()


def test_videos_are_trained_with_a_warning(caplog):
    check_exportable(StudentModel(attach_policy_head(ModuleNetwork(Branch(), (1, 2, 8, 8)), GMPolicySpec(2))))
    assert "no bundles of videos" in caplog.text
