"""The methods that `quality.py` compares, each with the same interface: `train` into a folder, `sampler` from there.

How pi-Flow and the others work is in the package and in `baselines.py`; this file brings them into one training loop.
"""

import json
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import ConsistencyConfig, MeanFlowConfig, Pairs
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.checkpoint import load_checkpoint, load_weights
from piflow_edge.distill.loop.training import IterationRandom, TrainingConfig, train
from piflow_edge.distill.networks.flow_network import FlowNetwork
from piflow_edge.distill.sources import TeacherModel, network_of
from piflow_edge.distill.student import distill, policy_of
from piflow_edge.distill.teacher import GuidanceConfig, GuidedTeacher
from piflow_edge.kernels.rollout import integrate, rollout
from piflow_edge.policies import DXPolicySpec, GMPolicySpec, PolicySpec
from piflow_edge.schedule import Schedule
from piflow_edge.system.files import write_atomic

TEACHER_STEPS = 50
# Floor inside the policy when it is followed; what `export` writes into bundles.
POLICY_EPS = 1e-4
SAMPLING_BATCH = 250


@dataclass(frozen=True)
class Setting:
    """What all methods share. `training`: but for the number of steps."""

    teacher: TeacherModel
    data: ImageData
    guidance: GuidanceConfig
    training: TrainingConfig
    device: torch.device

    @property
    def network(self) -> FlowNetwork:
        return self.teacher.network

    def velocity(self, **conditioning: Tensor) -> baselines.Velocity:
        guided = GuidedTeacher(self.network, self.guidance)
        return lambda x_t, sigma: guided.velocity(x_t, sigma, **conditioning)

    @property
    def runs_per_call(self) -> int:
        """Network evaluations of one call of the guided teacher."""
        return 1 if self.guidance.scale == 1 else 2


@dataclass(frozen=True)
class Work:
    """What a training step costs, in network evaluations per sample: calls of the guided `teacher`, evaluations
    `forward` and of those `backward`, and forward-mode derivatives `jvp`."""

    teacher: float
    forward: float = 1
    backward: float = 1
    jvp: float = 0


# (noise, labels, nfe, fresh: draw -> more noise) -> images
Sampler = Callable[[Tensor, Tensor, int, Callable[[int], Tensor]], Tensor]


class Method(Protocol):
    """A way to distil.

    `one_network_for_all`: whether one network serves every NFE. `work`: of a step. `settings`: for the record.
    """

    setting: Setting
    one_network_for_all: bool
    work: Work
    settings: dict

    def train(
        self, folder: Path, data: ImageData, training: TrainingConfig, nfe: int | None, pairs: int
    ) -> float:
        """Train into `folder`, or go on there; the seconds that went by before the first step.

        `nfe` is None where one network serves all; `pairs` is how many of the teacher's trajectories may be used.
        """
        ...

    def sampler(self, folder: Path) -> Sampler: ...


class PiFlow:
    """pi-ID as the package does it."""

    one_network_for_all = False

    def __init__(self, setting: Setting, head: PolicySpec):
        self.setting, self.head = setting, head
        self.work = Work(teacher=ImitationConfig().num_intermediate_states)
        self.settings = {"head": head.kind, **asdict(head), **without(asdict(ImitationConfig()), "nfe")}

    def train(self, folder: Path, data: ImageData, training: TrainingConfig, nfe: int, pairs: int) -> float:
        distill(
            self.setting.teacher,
            data,
            ImitationConfig(nfe=nfe),
            training,
            folder,
            guidance=self.setting.guidance,
            head=self.head,
            resume=True,
            integrate=integrate,
        )
        return 0.0

    def sampler(self, folder: Path) -> Sampler:
        student = network_of(load_checkpoint(folder, kind="student")).to(self.setting.device)

        def sample(noise, labels, nfe, fresh):
            x_t = noise
            for segment in Schedule(nfe).segments:
                sigma = np.full(len(x_t), segment.sigma_src)
                policy = policy_of(student, student.head, x_t, sigma, {"labels": labels}, eps=POLICY_EPS)
                x_t = rollout(policy, x_t, segment.sigma_src, segment.sigma_dst, segment.substeps)
            return x_t

        return sample


class Baseline(Method):
    """A method of `baselines`, in the package's training loop."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def start(self) -> FlowNetwork:
        """The network before the first step."""
        return deepcopy(self.setting.network).requires_grad_(True)

    def prepare(self, folder: Path, nfe: int | None, pairs: int) -> None:
        """What has to be there before the first step."""

    def loss(self, network: FlowNetwork, x_0: Tensor, conditioning: dict, random) -> Tensor:
        raise NotImplementedError

    def train(
        self, folder: Path, data: ImageData, training: TrainingConfig, nfe: int | None, pairs: int
    ) -> float:
        began = seconds(self.setting.device)
        folder.mkdir(parents=True, exist_ok=True)
        self.prepare(folder, nfe, pairs)
        network = self.start()
        note = folder / "seconds_before.json"  # a run that goes on finds its pairs made
        if not note.exists():
            write_atomic(note, json.dumps(seconds(self.setting.device) - began).encode())

        def loss(network, x_0, conditioning, random):
            x_0 = x_0.to(self.setting.device)
            conditioning = {name: value.to(self.setting.device) for name, value in conditioning.items()}
            return self.loss(network, x_0, conditioning, random)

        settings = {
            **self.settings,
            "guidance": asdict(self.setting.guidance),
            "teacher": self.setting.teacher.provenance["sha256"],
        }
        train(network, loss, data, training, folder, kind="student", settings=settings, resume=True)
        return json.loads(note.read_bytes())

    def load_trained(self, folder: Path) -> FlowNetwork:
        network = self.start()
        load_weights(network, load_checkpoint(folder, kind="student").group("ema"))
        return network.requires_grad_(False)


class Regression(Baseline):
    one_network_for_all = False
    work = Work(teacher=0)
    settings: ClassVar[dict] = {"method": "regression"}

    def prepare(self, folder, nfe, pairs):
        file = folder / "pairs.npz"
        if not file.exists():
            temporary = file.with_suffix(".part")
            self.make_pairs(nfe, pairs).save(temporary)
            os.replace(temporary, file)
        self.pairs = Pairs.load(file)

    def make_pairs(self, nfe: int, count: int) -> Pairs:
        """Trajectories of `TEACHER_STEPS` steps or a few more, so that the segments have equally many."""
        data, device = self.setting.data, self.setting.device
        substeps = -(-TEACHER_STEPS // nfe)
        made = []
        for batch, start in enumerate(range(0, count, SAMPLING_BATCH)):
            random = IterationRandom(self.setting.training.seed, 10**9 + batch)  # never an iteration's
            size = min(SAMPLING_BATCH, count - start)
            labels = torch.from_numpy(data.arrays["labels"][random.choice(len(data), size)]).to(device)
            noise = torch.from_numpy(random.normal((size, *data.shape))).to(device)
            velocity = self.setting.velocity(labels=labels)
            made.append(baselines.teacher_pairs(velocity, noise, labels, Schedule(nfe).sigmas, substeps))
        return Pairs(
            made[0].sigmas, torch.cat([m.states for m in made], 1), torch.cat([m.labels for m in made])
        )

    def loss(self, network, x_0, conditioning, random):
        return baselines.regression_loss(network, self.pairs, len(x_0), random, x_0.device)

    def sampler(self, folder):
        network = self.load_trained(folder)

        def sample(noise, labels, nfe, fresh):
            def velocity(x_t, sigma):
                return network(x_t, baselines.per_sample(sigma, x_t), labels=labels)

            return baselines.euler(velocity, noise, Schedule(nfe).sigmas.tolist())

        return sample


class Consistency(Baseline):
    one_network_for_all = True
    work = Work(teacher=2, forward=2)  # Heun's two calls; the target is evaluated too
    config = ConsistencyConfig()
    settings: ClassVar[dict] = {"method": "consistency", **asdict(config)}

    def train(self, *arguments, **options):
        self.target = None
        return super().train(*arguments, **options)

    def loss(self, network, x_0, conditioning, random):
        if self.target is None:  # a run that goes on forgets the 20 steps that the target averages over
            self.target = deepcopy(network).requires_grad_(False)
        else:
            baselines.follow(self.target, network, self.config.target_decay)
        velocity = self.setting.velocity(**conditioning)
        return baselines.consistency_loss(
            network, self.target, velocity, x_0, conditioning, random, self.config
        )

    def sampler(self, folder):
        network = self.load_trained(folder)

        def sample(noise, labels, nfe, fresh):
            sigmas = Schedule(nfe).sigmas.tolist()
            return baselines.consistency_sample(network, noise, sigmas, fresh, labels=labels)

        return sample


class MeanFlow(Baseline):
    one_network_for_all = True
    work = Work(teacher=1, forward=1, jvp=1)
    config = MeanFlowConfig()
    settings: ClassVar[dict] = {"method": "meanflow", **asdict(config)}

    def start(self):
        return baselines.mean_flow_from(self.setting.network).to(self.setting.device)

    def loss(self, network, x_0, conditioning, random):
        velocity = self.setting.velocity(**conditioning)
        return baselines.mean_flow_loss(network, velocity, x_0, conditioning, random, self.config)

    def load_trained(self, folder):
        network = baselines.MeanFlowNetwork(self.setting.network)
        load_weights(network, load_checkpoint(folder, kind="student").group("ema"))
        return network.to(self.setting.device).requires_grad_(False)

    def sampler(self, folder):
        network = self.load_trained(folder)

        def sample(noise, labels, nfe, fresh):
            return baselines.mean_flow_sample(network, noise, Schedule(nfe).sigmas.tolist(), labels=labels)

        return sample


DISTILLED = {
    "gm": ("pi-Flow GM", lambda setting: PiFlow(setting, GMPolicySpec(8))),
    "dx": ("pi-Flow DX", lambda setting: PiFlow(setting, DXPolicySpec(10))),
    "regression": ("direct regression", Regression),
    "consistency": ("consistency", Consistency),
    "meanflow": ("MeanFlow", MeanFlow),
}
# Name, solver, calls of the teacher in one step.
CUT_SHORT = {
    "euler": ("teacher, Euler", baselines.euler, 1),
    "heun": ("teacher, Heun", baselines.heun, 2),
    "dpm": ("teacher, DPM-Solver++", baselines.dpm_solver_2m, 1),
}


def seconds(device: torch.device) -> float:
    """The clock of a budget; see the top of this file."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def without(settings: dict, *names: str) -> dict:
    return {key: value for key, value in settings.items() if key not in names}
