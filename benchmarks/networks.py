"""Networks of any size to measure with: a DiT whose weights mean nothing, and a student of it as a bundle."""

from pathlib import Path

import torch

from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.loop.checkpoint import Checkpoint
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork, FlowNetwork, attach_policy_head, describe
from piflow_edge.export.to_bundle import export_bundle
from piflow_edge.policies import DXPolicySpec, GMPolicySpec, PolicySpec

GUIDANCE_SCALE = 1.5
# Takes 10 ms a call or more on two cores of a server: 256 tokens, 8 million weights. As many classes as ImageNet, for
# diffusers' DiTPipeline takes label 1000 for "no class".
LARGE = DiTConfig(
    in_channels=3, sample_size=32, patch_size=2, hidden_size=256, depth=6, num_heads=4, num_classes=1000
)


def teacher_of(config: DiTConfig, seed: int = 0) -> DiTNetwork:
    """A network that was never trained, but for whose velocity is as large as a trained one's."""
    torch.manual_seed(seed)
    network = DiTNetwork(config)
    with torch.no_grad():
        # adaLN-zero starts at 0, and would answer 0.
        for block in (*network.module.blocks, network.module.head):
            torch.nn.init.normal_(block.modulation.weight, std=0.02)
        torch.nn.init.normal_(network.module.head.out.weight, std=config.hidden_size**-0.5)
    return network.eval().requires_grad_(False)


def student_of(teacher: DiTNetwork, head: PolicySpec | None = None) -> FlowNetwork:
    """A student that starts as `teacher`; a Gaussian mixture of 8 unless another head is given."""
    return attach_policy_head(teacher, head or GMPolicySpec(8)).eval().requires_grad_(False)


def write_bundle(student: FlowNetwork, folder: Path, *, nfe: int = 1, substeps: int = 128) -> Path:
    """The student as a bundle in float32."""
    classes = tuple(map(str, range(student.config.num_classes)))
    settings = {
        "imitation": dict(nfe=nfe, shift=1.0, final_step_size_scale=1.0, total_substeps=substeps),
        "guidance": {"scale": GUIDANCE_SCALE, "interval": None, "orthogonal": 0.0},
    }
    weights = {f"ema.{name}": value for name, value in student.state_dict().items()}
    checkpoint = Checkpoint("student", 0, describe(student), settings, ClassLabels(classes), weights)
    export_bundle(checkpoint, folder, overwrite=True)
    return folder


def students_in(folder: Path, *, small: bool = False) -> dict[str, Path]:
    """Bundles of a student with each policy, of `LARGE`, or of a tiny network to try a script with."""
    teacher = teacher_of(DiTConfig(hidden_size=16, depth=1, num_heads=2) if small else LARGE)
    return {
        "DiT, GM of 8": write_bundle(student_of(teacher), folder / "gm"),
        "DiT, DX of 10": write_bundle(student_of(teacher, DXPolicySpec(10)), folder / "dx"),
    }
