"""The training loop that teacher and student share, on one process or on many.

A batch and everything random about it is the same for any number of processes and pieces it is cut into, and after a
run was stopped and resumed; see `randomness`.
"""

import json
import math
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from piflow_edge.distill.configs import DEFAULT_RUN, RunConfig, TrainingConfig
from piflow_edge.distill.data.datasets import ImageData
from piflow_edge.distill.networks.flow_network import FlowNetwork, describe, find_misfit
from piflow_edge.errors import CheckFailedError, CheckpointError, DataError, EngineError
from piflow_edge.system.files import check_room, sha256

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .journal import Journal, open_journal, summary_writer
from .processes import Processes
from .randomness import IterationRandom, Share, SharedRandom
from .state import State

# What a run killed while it wrote a file leaves behind; see `files.write_atomic`.
_LEFT_BEHIND = re.compile(r"\.(checkpoint\.json|log\.jsonl|weights-.*\.safetensors)\.[0-9a-f]{8}")

# Of one trained parameter in a checkpoint: itself, its average and two moments, in float32.
_CHECKPOINT_BYTES = 16
# Settings that may be others when a run goes on: it is made longer, or its batches cut for another machine.
_MAY_CHANGE = ("training.iterations", "training.batch_size")
# What describes the data, whose change is said in words; a file may have another name.
_OF_DATA = ("data", "data_sha256", "data_count", "data_images_sha256")
# What settings were in releases that did not record them.
_UNRECORDED = {"training": asdict(TrainingConfig()), "imitation": {"sigma_floor": 0.0}}

# (network, x_0, conditioning, random) -> scalar. The network to call is the one given: it is prepared for training.
Loss = Callable[[nn.Module, Tensor, dict[str, Tensor], Share], Tensor]
# (network) -> how far its images are from what they should be.
Compare = Callable[[nn.Module], float]
# (network) -> images, uint8 (B, H, W, C) with C 1 or 3, from the same noise each time.
Preview = Callable[[nn.Module], np.ndarray]


def train(
    network: FlowNetwork,
    loss: Loss,
    data: ImageData,
    config: TrainingConfig,
    folder: Path,
    *,
    kind: str,
    settings: dict,
    run: RunConfig = DEFAULT_RUN,
    frozen: Sequence[nn.Module] = (),
    preview: Preview | None = None,
    titles: Sequence[str] = (),
    remark: str = "",
    compare: Compare | None = None,
    resume: bool = False,
) -> Checkpoint:
    """Train `network` in place and leave a checkpoint in `folder`.

    Under `accelerate launch` all processes call this alike; the main one reads and writes. Ctrl-C ends the step that is
    being taken, saves a checkpoint and goes on as KeyboardInterrupt; a second one does not wait. A step whose loss or
    gradient is not finite is skipped: weights, moments and average stay as they are.

    Args:
        network: starts from the weights it has, unless a checkpoint is resumed; what has `requires_grad` is trained.
        loss: mean over the samples it is given, with gradient; see `Loss`.
        data: where `x_0` and its conditioning are drawn from.
        config: how to train.
        folder: where checkpoint, `log.jsonl` and samples go.
        kind, settings: recorded in the checkpoint; on `resume` they must be the same.
        run: how to carry the run out.
        frozen: other networks the loss calls; they are put on the device and run in mixed precision too.
        preview: makes the sheets of samples, from the averaged weights.
        titles: of the pictures on those sheets.
        remark: what the run's first line says besides.
        compare: measures the error to the teacher, with the averaged weights.
        resume: go on from the checkpoint in `folder` instead of refusing to overwrite it.

    Raises:
        DataError: the images or classes are not those the network is made for, or differ between processes.
        CheckpointError: there is a checkpoint and `resume` is False, or it is of another run.
        CheckFailedError: too many steps in a row were skipped.
        ShapeError, EngineError, MissingExtraError: a batch that cannot be cut; a setting that cannot run here.
    """
    folder = Path(folder)
    check_fit(network, data)
    processes = Processes(config.mixed_precision, run.gradient_accumulation)
    pieces = processes.share(config.batch_size)
    settings = _describe_run(settings, data, config, processes)

    def find() -> Checkpoint | None:
        return _prepare_folder(folder, resume, kind, network, data, settings, run)

    state, start = _begin(network, processes, find, run, frozen)

    def save(iteration: int) -> Checkpoint:
        found = Checkpoint(kind, iteration, describe(network), settings, data.conditioner, state.tensors())
        processes.from_main(lambda: save_checkpoint(folder, found))
        return found

    network.train()
    with ExitStack() as stack:
        stopped = stack.enter_context(_ctrl_c_between_steps())
        journal: Any = None
        if processes.is_main:
            opened = open_journal(folder, f"training {kind}", config, run, start, remark)
            journal = stack.enter_context(opened)
            journal.titles = titles
        for iteration in range(start, config.iterations):
            step, done = take_step(state, loss, data, config, pieces, iteration, stopped), iteration + 1
            if journal:
                journal.step(done, step.loss, step.norm, step.learning_rate, state.skipped)
            _check_progress(state, run, config, folder, done)
            if step.stop or (done % run.save_every == 0 and done < config.iterations):
                save(done)
            if step.stop:
                raise KeyboardInterrupt
            if preview and run.sample_every and done % run.sample_every == 0:
                _with_averages(preview, state, journal, lambda made, done=done: journal.pictures(done, made))
            if compare and run.compare_every and done % run.compare_every == 0:
                _with_averages(compare, state, journal, lambda error, done=done: journal.compare(done, error))
    final = save(config.iterations)
    processes.end()
    return final


def _describe_run(settings: dict, data: ImageData, config: TrainingConfig, processes: Processes) -> dict:
    """What a checkpoint records of a run, and what a resumed run must have in common with it."""
    training = asdict(config) | {"mixed_precision": processes.mixed_precision}
    described = {**settings, **data.settings(), "training": training}
    if processes.differ(sha256(json.dumps(described, sort_keys=True).encode())):
        raise DataError("the processes were not started alike: their data, teacher or settings differ")
    return described


def _prepare_folder(
    folder: Path,
    resume: bool,
    kind: str,
    network: FlowNetwork,
    data: ImageData,
    settings: dict,
    run: RunConfig,
) -> Checkpoint | None:
    """Make the folder of a run ready, and return the checkpoint to go on from. The main process calls this."""
    checkpoint = _earlier(folder, resume, kind, describe(network), data, settings)
    if run.tensorboard:
        summary_writer()  # its absence is better known before the run
    folder.mkdir(parents=True, exist_ok=True)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    check_room(folder, trained * _CHECKPOINT_BYTES, "a checkpoint")
    for left in filter(_LEFT_BEHIND.fullmatch, os.listdir(folder)):
        (folder / left).unlink()
    return checkpoint


def _begin(
    network: FlowNetwork,
    processes: Processes,
    find: Callable[[], Checkpoint | None],
    run: RunConfig,
    frozen: Sequence[nn.Module],
) -> tuple[State, int]:
    """Return the state that a run starts from, and the iterations that are done.

    `find` is called by the main process alone and returns the checkpoint to go on from.
    """
    tensors: dict[str, Tensor] = {}

    def read() -> tuple[int, list[str]]:
        checkpoint = find()
        if checkpoint is None:
            return 0, []
        tensors.update(checkpoint.tensors)
        return checkpoint.iteration, list(tensors)

    start, names = processes.from_main(read)
    if run.gradient_checkpointing:
        _checkpoint_gradients(network.module)
    for module in frozen:
        processes.place(module)
    if run.compile:  # in place: the names of the weights stay
        for compiled in (network, *frozen):
            getattr(compiled, "module", compiled).compile()
    state = State(network, processes)
    if names:
        state.restore(tensors, names)
    return state, start


@dataclass(frozen=True)
class Step:
    """What one step came to, the same on every process: `norm` is the gradient's, `stop` says that Ctrl-C came."""

    loss: float
    norm: float
    learning_rate: float
    stop: bool


def take_step(
    state: State,
    loss: Loss,
    data: ImageData,
    config: TrainingConfig,
    pieces: list[slice],
    iteration: int,
    stopped: Callable[[], bool],
) -> Step:
    """Take one step, or skip it where its loss or gradient is not finite."""
    value = gradients(state, loss, data, config, pieces, iteration)
    norm = state.clip(config.max_grad_norm)
    # Every process must decide alike, so none goes by its own numbers.
    value, norm, stop = state.processes.mean(value, norm, stopped())
    rate = learning_rate(config, iteration)
    if math.isfinite(value) and math.isfinite(norm):
        # Averaged over fewer steps at first, so that the start is soon forgotten.
        state.step(rate, decay=min(config.ema_decay, (1 + iteration) / (10 + iteration)))
    else:
        state.skip()
    return Step(value, norm, rate, bool(stop))


def gradients(
    state: State, loss: Loss, data: ImageData, config: TrainingConfig, pieces: list[slice], iteration: int
) -> Tensor:
    """Take the gradient of an iteration's batch, over all processes; the mean loss of the rows in `pieces`."""
    processes = state.processes
    random = SharedRandom(IterationRandom(config.seed, iteration), config.batch_size)
    picked = random.random.choice(len(data), config.batch_size)
    draws = random.random.uniform(config.batch_size) if data.several else None
    # For networks that draw from torch's own state, as dropout does.
    key = np.random.SeedSequence([config.seed, iteration, processes.index])
    torch.manual_seed(int(key.generate_state(1)[0]))
    state.optimizer.zero_grad()
    total = torch.zeros((), device=processes.device)
    for piece in pieces:
        x_0, conditioning = data.batch(picked[piece], None if draws is None else draws[piece])
        x_0 = torch.from_numpy(x_0).to(processes.device)
        conditioning = {name: torch.from_numpy(v).to(processes.device) for name, v in conditioning.items()}
        with processes.syncing(state.prepared, last=piece == pieces[-1]):
            value = loss(state.prepared, x_0, conditioning, random.rows(piece))
            processes.accelerator.backward(value)
        total = total + value.detach() / len(pieces)
    return total


def _with_averages(make: Callable, state: State, journal: Journal | None, note: Callable) -> None:
    """What the averaged weights make goes to `note`; the main process makes it, or all where none has all weights."""
    if journal or state.processes.sharded:
        # Not compiled: other batches than those of training would be compiled anew, for a few calls.
        with torch.compiler.set_stance("force_eager"), state.use_averages() as network:
            found = make(network)
        if journal:
            note(found)


def _check_progress(state: State, run: RunConfig, config: TrainingConfig, folder: Path, done: int) -> None:
    """Raise CheckFailedError where too many of the last steps were skipped."""
    saved = "the last checkpoint is whole" if (folder / "checkpoint.json").exists() else "none was saved yet"
    # A far too large rate leaves the first steps finite and none after them: no run ends well with such weights.
    most = -(-config.iterations // 2) if done == config.iterations else config.iterations
    if state.skipped_in_a_row >= min(run.max_skipped_in_a_row, most):
        raise CheckFailedError(
            f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row, up to iteration {done}; "
            f"{saved}. Look at the learning rate ({config.learning_rate:g}; try a third), at the data "
            "(finite, about -1 to 1?), at what the teacher returns for it, and at mixed precision "
            f"({state.processes.mixed_precision}; 'no' or 'bf16' hold larger numbers than 'fp16')"
        )


def _checkpoint_gradients(network: nn.Module) -> None:
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        if hasattr(network, name):
            getattr(network, name)()
            return
    raise EngineError(
        f"{type(network).__name__} has no gradient checkpointing (a method enable_gradient_checkpointing); train it "
        "without, with more gradient accumulation instead"
    )


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Linear rise over `warmup` steps, and the decay that the settings name."""
    rise = min((iteration + 1) / max(config.warmup, 1), 1.0)
    return config.learning_rate * rise * _DECAYS[config.learning_rate_decay](config, iteration)


# Share of the learning rate that is left at an iteration, by the name of the decay.
_DECAYS: dict[str, Callable[[TrainingConfig, int], float]] = {
    "cosine": lambda config, iteration: 0.5 * (1 + np.cos(np.pi * iteration / config.iterations)),
    "inverse-sqrt": lambda config, iteration: math.sqrt(min(1.0, max(config.warmup, 1) / (iteration + 1))),
}


@contextmanager
def _ctrl_c_between_steps() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until it is asked for: half a step must not end up in a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread, whose business they then are
        return
    is_asked = False

    def note(number, frame):
        nonlocal is_asked
        is_asked = True
        signal.signal(signal.SIGINT, before)  # a second one does not wait

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: is_asked
    finally:
        signal.signal(signal.SIGINT, before)


def check_fit(network: FlowNetwork, data: ImageData) -> None:
    """Raise DataError unless the data's states, and what steers them, are those the network is made for."""
    if data.shape != network.sample_shape:
        raise DataError(
            f"the network is made for states (C, H, W) = {network.sample_shape}; those of {data.name!r} are "
            f"{data.shape}"
        )
    problem = find_misfit(network, data.conditioner)
    if problem:
        raise DataError(
            f"{problem}; of {data.name!r}: {data.conditioner.summarize()}{suggest_steering(data)}"
        )


def suggest_steering(data: ImageData) -> str:
    """Return how data are given what steers a network, as the end of a message."""
    if data.captions is not None and not data.several:
        return "; give --text-encoder, which reads the captions"
    return (
        "; classes are a folder each, or 'labels' in an .npz; encodings are its arrays 'cond_NAME', or made of "
        "captions by --text-encoder"
    )


def _earlier(
    folder: Path, resume: bool, kind: str, network: dict, data: ImageData, settings: dict
) -> Checkpoint | None:
    """The checkpoint to go on from, if there is one."""
    if not (folder / "checkpoint.json").exists():
        return None
    if not resume:
        raise CheckpointError(
            f"{folder} holds a checkpoint already; give --resume to go on, or another folder"
        )
    checkpoint = load_checkpoint(folder, kind=kind)
    _check_same_run(checkpoint, network, data, settings, folder)
    return checkpoint


def _check_same_run(checkpoint: Checkpoint, network: dict, data: ImageData, settings: dict, folder: Path):
    was = {"network": checkpoint.network, "conditioning": checkpoint.conditioner.to_json()}
    now = {"network": network, "conditioning": data.conditioner.to_json()}
    was, now = _flat({**was, **checkpoint.settings}), _flat(json.loads(json.dumps({**now, **settings})))
    was = _flat({name: _UNRECORDED[name] for name in _UNRECORDED if name in checkpoint.settings}) | was
    if "teacher.sha256" in now:  # of its weights: how they were trained follows from it
        was, now = (
            {k: v for k, v in one.items() if not k.startswith("teacher.settings.")} for one in (was, now)
        )
    keys = [key for key in {**was, **now} if key not in _MAY_CHANGE + _OF_DATA]
    odd = [f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in keys if was.get(k) != now.get(k)]
    odd += _name_change_of_data(was, now)
    if settings["training"]["iterations"] < checkpoint.iteration:
        odd.append(
            f"iterations are {settings['training']['iterations']}, and {checkpoint.iteration} are done"
        )
    if odd:
        raise CheckpointError(
            f"{folder} holds a checkpoint with other settings ({'; '.join(odd)}); "
            "go on with the same, or use another folder"
        )


def _name_change_of_data(was: dict, now: dict) -> list[str]:
    """Say what changed in the data, of which settings hold checksums; earlier releases held one of all alone."""
    if was.get("data_sha256") == now["data_sha256"]:
        return []
    count, names = was.get("data_count"), f"data were {was.get('data')!r}, are {now['data']!r}: "
    if count is None:
        return [f"{names}images, or what steers them, are others"]
    if count != now["data_count"]:
        return [f"{names}{count} images then, {now['data_count']} now"]
    if was["data_images_sha256"] != now["data_images_sha256"]:
        return [f"{names}pixels of the {count} images are others"]
    return [f"{names}labels, captions or encodings of the {count} images are others"]


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one level, keys joined by dots."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
