"""Training on two processes, and runs that are killed: the same loss, and the same weights to the last bit.

The processes are forked from a server that has loaded torch, and set up as `accelerate launch` does; one test goes
through `accelerate launch` itself.
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
from functools import partial

import numpy as np
import pytest
import torch

from piflow_edge.conditioning import ClassLabels
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.imitation import ImitationConfig
from piflow_edge.distill.loop.checkpoint import Checkpoint, load_checkpoint
from piflow_edge.distill.loop.randomness import IterationRandom
from piflow_edge.distill.loop.training import RunConfig, TrainingConfig
from piflow_edge.distill.networks.dit import DiTConfig
from piflow_edge.distill.networks.flow_network import DiTNetwork, describe
from piflow_edge.distill.sources import teacher_from_checkpoint
from piflow_edge.distill.student import distill
from piflow_edge.distill.teacher import FlowMatchingConfig, GuidanceConfig, train_teacher
from piflow_edge.policies import GMPolicySpec
from tests.commands.command_line import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills and forks processes")

TINY = DiTConfig(sample_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=2)
CONFIG = TrainingConfig(iterations=16, batch_size=8, warmup=2)
LOGGED = RunConfig(log_every=1, save_every=5)

# Two processes add up a gradient in another order than one. That is 2^-24 of it, but Adam makes of a gradient near 0 a
# step of full length in either direction: losses were seen to part by 9e-6 of their value in 16 steps, 2e-5 in 200.
TOLERANCE = 1e-4


def make_data(*, broken=False):
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = (labels[:, None, None, None] - 0.5 + 0.1 * rng.standard_normal((64, 1, 4, 4))).astype(np.float32)
    if broken:
        images[5] = np.nan  # every step that draws this image is to be skipped
    return WatchedData("flat", images, ClassLabels(("dark", "light")), {"labels": labels})


class WatchedData(ImageData):
    """Data that lets something happen when its n-th batch is asked for, or takes its time over each."""

    count, at, happens, delay = 0, None, None, 0.0

    def batch(self, indices, draws=None):
        if np.array_equal(indices, [0, 1]):  # a look at what the data are like, before the first step
            return super().batch(indices, draws)
        WatchedData.count += 1
        if WatchedData.count == WatchedData.at:
            WatchedData.happens()
        time.sleep(WatchedData.delay)
        return super().batch(indices, draws)


def make_teacher():
    torch.manual_seed(0)
    network = DiTNetwork(TINY)
    dit = network.module
    for layer in (dit.head.out, dit.head.modulation, *(block.modulation for block in dit.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.2)  # adaLN-zero starts at 0, where bugs hide
    tensors = {f"ema.{name}": value for name, value in network.state_dict().items()}
    return Checkpoint("teacher", 0, describe(network), {}, ClassLabels(("dark", "light")), tensors)


def job(folder, *, config=CONFIG, run=LOGGED, broken=False, resume=False, teacher=False):
    """One run, of a student or a teacher."""
    data = make_data(broken=broken)
    if teacher:
        return train_teacher(data, TINY, FlowMatchingConfig(), config, folder, run=run, resume=resume)
    imitation = ImitationConfig(nfe=2, total_substeps=16)
    return distill(
        teacher_from_checkpoint(make_teacher()),
        data,
        imitation,
        config,
        folder,
        guidance=GuidanceConfig(1.5),
        head=GMPolicySpec(3),
        run=run,
        resume=resume,
    )


def child(index, count, port, jobs):
    """What a started process does: its jobs, one after the other. How each ended goes to `outcome-<index>`."""
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {
            "RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
    for folder, settings, *before in jobs:
        WatchedData.count, WatchedData.at = 0, None
        for call in before:
            call(index)
        try:
            job(folder, **settings)
            outcome = "done"
        except (Exception, KeyboardInterrupt) as error:
            outcome = f"{type(error).__name__}: {error}"
        folder.mkdir(exist_ok=True)
        with (folder / f"outcome-{index}").open("a") as file:
            file.write(outcome + "\n")


def start(count, *jobs):
    """Start `count` processes that do the same jobs: (folder, settings of `job`, what happens before)."""
    context = multiprocessing.get_context("forkserver")
    # The last two are what each process would load by itself, torch._dynamo with the first optimiser.
    context.set_forkserver_preload(["piflow_edge.distill.student", "torch._dynamo", "pytest"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=child, args=(i, count, port, jobs), daemon=True) for i in range(count)
    ]
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
    finish(start(count, *jobs))


def outcomes(folder):
    """How the jobs in a folder ended, for each process."""
    return [path.read_text().splitlines() for path in sorted(folder.glob("outcome-*"))]


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
        WatchedData.at, WatchedData.happens = 7, lambda: signal.raise_signal(signal.SIGINT)


def interrupt(index):
    WatchedData.at, WatchedData.happens = 7, lambda: signal.raise_signal(signal.SIGINT)


def share_weights(index, precision="no"):
    """FSDP as on GPUs. accelerate has none for CPUs: it is told that it chose it, and torch does the rest."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    Accelerator(cpu=True, mixed_precision=precision)
    state, plugin = AcceleratorState(), FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    if precision != "no":
        plugin.set_mixed_precision(precision)
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def scale_losses(index):
    """fp16 as on GPUs, with a scale that is too large at first. accelerate has none for CPUs, torch does."""
    from accelerate import Accelerator

    from piflow_edge.distill.loop import processes

    class ScalingAccelerator(Accelerator):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
            self.native_amp = True

    processes.Accelerator = ScalingAccelerator


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in many ways: on one process, and on two."""
    folder = tmp_path_factory.mktemp("runs")
    halves = replace(LOGGED, gradient_accumulation=2)
    slim = replace(LOGGED, gradient_checkpointing=True, sample_every=3)
    slim_halves, again = replace(slim, gradient_accumulation=2), {"resume": True}
    bf16, fp16 = ({"config": replace(CONFIG, mixed_precision=name)} for name in ("bf16", "fp16"))
    thirds = {"config": replace(CONFIG, batch_size=12)}
    groups = [
        start(
            1,
            (folder / "one", {}),
            (folder / "one-in-parts", {"run": halves}),
            (folder / "one-slim", {"run": slim}),
            (folder / "one-broken", {"broken": True}),
            (folder / "one-teacher", {"teacher": True}),
            (folder / "moved", {}, interrupt),
        ),
        start(
            2,
            (folder / "two", {}),
            (folder / "two-in-parts", {"run": halves}),
            (folder / "two-slim", {"run": slim_halves}),
            (folder / "two-teacher", {"teacher": True}),
            (folder / "two-interrupted", {}, interrupt_second_process),
            (folder / "two-interrupted", again),
            (folder / "two-broken", {"broken": True}),
            (folder / "two-broken-interrupted", {"broken": True}, interrupt_second_process),
            (folder / "two-broken-interrupted", {"broken": True} | again),
            (folder / "indivisible", {"config": replace(CONFIG, batch_size=7)}),
            (folder / "two", {}),  # is there already
            (folder / "diverging", {"config": replace(CONFIG, learning_rate=1e38)}),
        ),
    ]
    for group in groups:
        finish(group)
    groups = [
        start(
            2,
            (folder / "sharded", {"run": slim_halves}, share_weights),
            (folder / "sharded-interrupted", {"run": slim_halves}, interrupt_second_process),
            (folder / "sharded-interrupted", {"run": slim_halves} | again),
            (folder / "moved", again),
        ),
        start(
            3,
            (folder / "three", thirds),
            (folder / "three-interrupted", thirds, interrupt_second_process),
            (folder / "three-interrupted", thirds | again),
        ),
        start(1, (folder / "one-bf16", bf16)),
        start(
            2,
            (folder / "two-bf16", bf16),
            (folder / "sharded-bf16", bf16, partial(share_weights, precision="bf16")),
        ),
        start(
            1,
            (folder / "fp16-on-cpu", fp16),
            (folder / "fp16", fp16, scale_losses),
            (folder / "fp16-interrupted", fp16, interrupt),
            (folder / "fp16-interrupted", fp16 | again),
        ),
    ]
    for group in groups:
        finish(group)
    return folder


@pytest.mark.parametrize("way", ["one-in-parts", "one-slim", "two", "two-in-parts", "two-slim", "sharded"])
def test_the_loss_curve_does_not_depend_on_how_the_batch_is_shared_out(runs, way):
    assert len(losses(runs / way)) == CONFIG.iterations
    np.testing.assert_allclose(losses(runs / way), losses(runs / "one"), rtol=TOLERANCE)


def test_a_teacher_trains_alike_on_two_processes(runs):
    np.testing.assert_allclose(losses(runs / "two-teacher"), losses(runs / "one-teacher"), rtol=TOLERANCE)


@pytest.mark.parametrize("way", ["two", "sharded"])
def test_half_precision_trains_alike_on_two_processes(runs, way):
    expected = losses(runs / "one-bf16")
    assert expected != losses(runs / "one")
    # bfloat16 rounds at 2^-9, and the order of sums decides which way.
    np.testing.assert_allclose(losses(runs / f"{way}-bf16"), expected, rtol=0.02)
    np.testing.assert_allclose(expected, losses(runs / "one"), rtol=0.02)


@pytest.mark.parametrize(("way", "count"), [("two", 2), ("three", 3), ("sharded", 2)])
def test_ctrl_c_in_one_process_stops_all_and_resumed_they_end_with_the_same_weights(runs, way, count):
    # Three, because sums of two numbers do not tell in what order they were taken.
    assert outcomes(runs / f"{way}-interrupted") == [["KeyboardInterrupt: ", "done"]] * count
    assert_same_weights(runs / f"{way}-interrupted", runs / way)


def test_a_run_can_go_on_with_another_number_of_processes(runs):
    np.testing.assert_allclose(losses(runs / "moved"), losses(runs / "one"), rtol=TOLERANCE)
    assert outcomes(runs / "moved") == [["KeyboardInterrupt: ", "done"], ["done"]]


def test_steps_that_are_not_finite_are_skipped_and_counted(runs):
    drawn = [IterationRandom(CONFIG.seed, i).choice(64, CONFIG.batch_size) for i in range(CONFIG.iterations)]
    skipped = [5 in picked for picked in drawn]
    assert 0 < sum(skipped) < CONFIG.iterations
    for way in ("one-broken", "two-broken"):
        assert [loss is None for loss in losses(runs / way)] == skipped
        assert [line["skipped"] for line in log(runs / way)] == np.cumsum(skipped).tolist()
        assert all(v.isfinite().all() for v in load_checkpoint(runs / way).tensors.values())


def test_a_resumed_run_with_skipped_steps_ends_with_the_same_weights(runs):
    assert_same_weights(runs / "two-broken-interrupted", runs / "two-broken")
    assert log(runs / "two-broken-interrupted")[-1]["skipped"] == log(runs / "two-broken")[-1]["skipped"]


def test_too_many_skipped_steps_stop_all_processes(runs):
    for lines in outcomes(runs / "diverging"):
        assert "CheckFailedError: loss or gradient was not finite in 10 steps in a row" in lines[0]
        for word in ("learning rate", "data", "teacher", "mixed precision"):
            assert word in lines[0]


def test_every_process_hears_what_is_wrong(runs):
    assert all("batch_size a multiple of 2" in lines[0] for lines in outcomes(runs / "indivisible"))
    assert [lines[-1].partition(":")[0] for lines in outcomes(runs / "two")] == ["CheckpointError"] * 2
    assert "fp16 needs a GPU" in outcomes(runs / "fp16-on-cpu")[0][0]


def test_the_scale_of_fp16_is_resumed(runs):
    assert 0 < log(runs / "fp16")[-1]["skipped"] < 10  # the scale it starts with is too large
    assert_same_weights(runs / "fp16-interrupted", runs / "fp16")
    assert load_checkpoint(runs / "fp16").tensors["run.loss_scale"][0] < 2**22


@pytest.mark.parametrize("way", ["one-slim", "two-slim", "sharded"])
def test_samples_are_shown_and_do_not_disturb_training(runs, way):
    assert [f.stem for f in sorted((runs / way / "samples").iterdir())] == [
        f"{i:07d}" for i in (3, 6, 9, 12, 15)
    ]


def kill_itself(calls, index):
    """Let the main process kill itself right before the n-th time it asks for a file to be synced or renamed."""
    done = 0

    def count_calls(call, *arguments):
        nonlocal done
        done += 1
        if done == calls and index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)

    os.fsync, os.replace = partial(count_calls, os.fsync), partial(count_calls, os.replace)


def take_time(index):
    WatchedData.delay = 0.02


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_weights(runs, tmp_path, count):
    settings, rng = {"run": replace(LOGGED, save_every=2), "resume": True}, random.Random(count)
    # Of the two calls that open the log and the four of each save: within the first save, and later ones.
    for calls in [3, 4, 5, 6] if count == 1 else [4, 5]:
        processes = start(count, (tmp_path, settings, partial(kill_itself, calls)))
        processes[0].join(60)
        assert processes[0].exitcode == -signal.SIGKILL
        for process in processes:  # as a launcher does
            process.kill()
            process.join()
    for _ in range(4 if count == 1 else 2):
        processes = start(count, (tmp_path, settings, take_time))
        time.sleep(rng.uniform(0.3, 1.5))
        for process in processes:
            process.kill()
            process.join()
    do(count, (tmp_path, settings))
    assert_same_weights(tmp_path, runs / ("one" if count == 1 else "two"))
    assert losses(tmp_path) == losses(runs / ("one" if count == 1 else "two"))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_accelerate_launch_trains_on_two_processes_until_ctrl_c(tmp_path):
    # On GPUs the same command without num_processes takes all there are.
    out, launch = (
        tmp_path / "out",
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    )
    command = ["distill", "--iterations", "100", "--batch-size", "4", "--log-every", "1", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *launch, "-m", "piflow_edge.cli", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while not ((out / "log.jsonl").exists() and log(out)) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert "--resume goes on" in stderr, stderr
    stopped = load_checkpoint(out)
    assert len(log(out)) == stopped.iteration < 100

    assert run(*command, "--resume").stdout == f"{out}\n"
    assert [line["iteration"] for line in log(out)] == list(range(1, 101))
