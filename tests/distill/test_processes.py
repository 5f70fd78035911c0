"""Training on two processes, and runs that are killed: the same loss, and the same weights to the last bit.

The processes are forked from a server that has loaded torch, and set up as `accelerate launch` does; one test goes through
`accelerate launch` itself.
"""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from piflow_edge.distill.checkpoint import Checkpoint, load_checkpoint
from piflow_edge.distill.data import ImageData
from piflow_edge.distill.dit import DiT, DiTConfig
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import FlowMatchingConfig, train_teacher
from piflow_edge.distill.training import RunConfig, TrainingConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and forks processes")

TINY = DiTConfig(sample_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=2)
CONFIG = TrainingConfig(iterations=16, batch_size=8, warmup=2)
LOGGED = RunConfig(log_every=1, save_every=5)

# Two processes add up a gradient in another order than one. That is 2^-24 of it, and Adam makes of a gradient near 0 a
# step of full length in either direction; over 16 steps losses were seen to part by up to 3e-6 of their value.
TOLERANCE = 1e-4


def make_data(*, broken=False):
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = (labels[:, None, None, None] - 0.5 + 0.1 * rng.standard_normal((64, 1, 4, 4))).astype(np.float32)
    if broken:
        images[5] = np.nan  # every step that draws this image is to be skipped
    return Watched("flat", images, labels, ("dark", "light"))


class Watched(ImageData):
    """Data that lets something happen when the n-th batch is asked for."""

    events = {}  # noqa: RUF012

    def batch(self, indices):
        self.events.setdefault("count", 0)
        self.events["count"] += 1
        if self.events["count"] == self.events.get("at"):
            self.events["do"]()
        return super().batch(indices)


def make_teacher():
    torch.manual_seed(0)
    network = DiT(TINY)
    for layer in (network.head.out, network.head.modulation, *(block.modulation for block in network.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.2)  # adaLN-zero starts at 0, where bugs hide
    tensors = {f"ema.{name}": value for name, value in network.state_dict().items()}
    return Checkpoint("teacher", 0, TINY, {}, ("dark", "light"), tensors)


def job(folder, *, config=CONFIG, run=LOGGED, broken=False, resume=False, teacher=False):
    """One run, of a student or a teacher."""
    data = make_data(broken=broken)
    if teacher:
        return train_teacher(data, TINY, FlowMatchingConfig(), config, folder, run=run, resume=resume)
    imitation = ImitationConfig(nfe=2, total_substeps=16)
    return distill(
        make_teacher(), data, imitation, config, folder, guidance_scale=1.5, num_components=3, run=run, resume=resume
    )


def child(index, count, port, jobs):
    """What a started process does: its jobs, one after the other. How each ended goes to `outcome-<index>`."""
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {
            "RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    for folder, settings, before in jobs:
        Watched.events.clear()
        if before is not None:
            before(index)
        try:
            job(folder, **settings)
            outcome = "done"
        except (Exception, KeyboardInterrupt) as error:
            outcome = f"{type(error).__name__}: {error}"
        folder.mkdir(exist_ok=True)
        (folder / f"outcome-{index}").write_text(outcome)


def start(count, *jobs):
    """Start `count` processes that do the same jobs: (folder, settings of `job`, what happens before)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["piflow_edge.distill.student"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=child, args=(i, count, port, jobs), daemon=True) for i in range(count)]
    for process in processes:
        process.start()
    return processes


def finish(processes, limit=120):
    for process in processes:
        process.join(limit)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "a process did not end"


def do(count, *jobs):
    finish(start(count, *[(*job, None) if len(job) == 2 else job for job in jobs]))


def outcomes(folder):
    return [path.read_text() for path in sorted(folder.glob("outcome-*"))]


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in log(folder)]


def assert_same_weights(one, other):
    one, other = (load_checkpoint(folder) for folder in (one, other))
    assert one.iteration == other.iteration and one.tensors.keys() == other.tensors.keys()
    for name, value in one.tensors.items():
        assert torch.equal(value, other.tensors[name]), name


def interrupt_second_process(index):
    if index == 1:
        Watched.events.update(at=7, do=lambda: signal.raise_signal(signal.SIGINT))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in many ways: on one process, and on two."""
    folder = tmp_path_factory.mktemp("runs")
    halves = replace(LOGGED, gradient_accumulation=2)
    do(
        1,
        (folder / "one", {}),
        (folder / "one-in-parts", {"run": halves}),
        (folder / "one-broken", {"broken": True}),
        (folder / "checkpointed", {"run": replace(LOGGED, gradient_checkpointing=True)}),
        (folder / "teacher-one", {"teacher": True}),
        (folder / "stopped-on-two", {"config": CONFIG}),
    )
    do(
        2,
        (folder / "two", {}),
        (folder / "two-in-parts", {"run": halves}),
        (folder / "two-broken", {"broken": True}),
        (folder / "two-checkpointed", {"run": replace(halves, gradient_checkpointing=True)}),
        (folder / "teacher-two", {"teacher": True}),
        (folder / "interrupted", {}, interrupt_second_process),
        (folder / "indivisible", {"config": replace(CONFIG, batch_size=7)}),
        (folder / "one", {}),  # is there already
        (folder / "no-numbers", {"config": replace(CONFIG, learning_rate=float("inf"))}),
    )
    return folder


@pytest.mark.parametrize("way", ["one-in-parts", "two", "two-in-parts", "checkpointed", "two-checkpointed"])
def test_the_loss_curve_does_not_depend_on_how_the_batch_is_shared_out(runs, way):
    assert len(losses(runs / way)) == CONFIG.iterations
    np.testing.assert_allclose(losses(runs / way), losses(runs / "one"), rtol=TOLERANCE)


def test_a_teacher_trains_alike_on_two_processes(runs):
    np.testing.assert_allclose(losses(runs / "teacher-two"), losses(runs / "teacher-one"), rtol=TOLERANCE)
