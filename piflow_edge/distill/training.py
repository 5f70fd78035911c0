"""The training loop that teacher and student share: optimiser, averaged weights, checkpoints, progress.

Every iteration draws from a generator of its own, keyed by (seed, iteration): no random state has to be saved,
and a resumed run takes the same steps as one that was never stopped.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from piflow_edge.errors import CheckFailedError, CheckpointError, DataError
from piflow_edge.progress import progress

from .checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from .data import ImageData
from .networks import FlowNetwork, describe


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        iterations: optimiser steps.
        batch_size: samples per step.
        learning_rate: of Adam, reached after `warmup` steps, then falling to 0 along half a cosine.
        warmup: steps of linear rise.
        ema_decay: of the averaged weights; lower at the start.
        max_grad_norm: gradients longer than this are shortened to it.
        seed: of everything random.
        save_every: steps between checkpoints.
    """

    iterations: int = 1400
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    seed: int = 0
    save_every: int = 500


class IterationRandom:
    """The random numbers of one iteration; see `imitation.Random`."""

    def __init__(self, seed: int, iteration: int):
        self.iteration = iteration
        self._generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, iteration])))

    def uniform(self, shape) -> np.ndarray:
        return self._generator.random(shape)

    def normal(self, shape) -> np.ndarray:
        return self._generator.standard_normal(shape, dtype=np.float32)

    def shared_choice(self, count: int) -> int:
        return int(self._generator.integers(0, count))

    def choice(self, count: int, size: int) -> np.ndarray:
        """`size` whole numbers below `count`, with repetition."""
        return self._generator.integers(0, count, size)

    def permutation(self, count: int) -> np.ndarray:
        """0 to count - 1 in random order."""
        return self._generator.permutation(count)


# (network, x_0, conditioning, random) -> scalar
Loss = Callable[[FlowNetwork, Tensor, dict[str, Tensor], IterationRandom], Tensor]


def train(
    network: FlowNetwork,
    loss: Loss,
    data: ImageData,
    config: TrainingConfig,
    folder: Path,
    *,
    kind: str,
    settings: dict,
    resume: bool = False,
) -> Checkpoint:
    """Train `network` in place and leave a checkpoint in `folder`.

    Ctrl-C ends the step that is being taken, saves a checkpoint and goes on as KeyboardInterrupt; a second one does
    not wait. Steps are written to `log.jsonl`.

    Args:
        network: starts from the weights it has, unless a checkpoint is resumed.
        loss: `(network, x_0, conditioning, random) -> scalar` with gradient.
        data: where `x_0` and `conditioning` are drawn from.
        config: how to train.
        folder: where the checkpoint goes.
        kind, settings: recorded in the checkpoint; on `resume` they must be the same.
        resume: go on from the checkpoint in `folder` instead of refusing to overwrite it.

    Raises:
        DataError: the images or classes are not those the network is made for.
        CheckpointError: there is a checkpoint and `resume` is False, or it is of another run.
        CheckFailedError: the loss is not finite.
    """
    folder = Path(folder)
    check_fit(network, data)
    settings = {**settings, "data_sha256": data.fingerprint(), "training": vars(config).copy()}
    parameters = {k: v for k, v in network.named_parameters() if v.requires_grad}
    ema = {k: v.detach().clone() for k, v in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    start = 0
    if (folder / "checkpoint.json").exists():
        if not resume:
            raise CheckpointError(
                f"{folder} holds a checkpoint already; give --resume to go on, or another folder"
            )
        checkpoint = load_checkpoint(folder, kind=kind)
        _check_same_run(checkpoint, describe(network), data, settings, folder)
        start = _restore(checkpoint, network, ema, optimizer)

    def snapshot(iteration):
        tensors = {f"ema.{k}": v for k, v in ema.items()} | {
            f"raw.{k}": v.detach() for k, v in parameters.items()
        }
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})  # nothing before its first step
            tensors |= {f"adam.{part}.{name}": value for part, value in state.items()}
        return Checkpoint(kind, iteration, describe(network), settings, data.class_names, tensors)

    folder.mkdir(parents=True, exist_ok=True)
    network.train()
    done, began = start, time.perf_counter()
    with (
        _ctrl_c_between_steps() as stopped,
        progress(f"training {kind}", config.iterations, start=start) as bar,
        _log(folder, start) as log,
    ):
        for iteration in range(start, config.iterations):
            random = IterationRandom(config.seed, iteration)
            x_0, conditioning = data.batch(random.choice(len(data), config.batch_size))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, iteration)
            given = {name: torch.from_numpy(array) for name, array in conditioning.items()}
            value = loss(network, torch.from_numpy(x_0), given, random)
            optimizer.zero_grad()
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise CheckFailedError(
                    f"loss {value.item()} or its gradient is not finite at iteration {iteration}; the last "
                    f"checkpoint is whole; try a lower learning rate than {config.learning_rate}"
                )
            optimizer.step()
            # Averaged over fewer steps at first, so that the start is soon forgotten.
            decay = min(config.ema_decay, (1 + iteration) / (10 + iteration))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), list(parameters.values()), 1 - decay)
            done = iteration + 1
            speed = (done - start) * config.batch_size / (time.perf_counter() - began)
            bar(f"loss {value.item():.4f}, {speed:.0f} images/s")
            if done % 50 == 0 or done == config.iterations:
                log.write(json.dumps({"iteration": done, "loss": value.item(), "images_per_s": speed}) + "\n")
            if stopped() or (done % config.save_every == 0 and done < config.iterations):
                save_checkpoint(folder, snapshot(done))
            if stopped():
                raise KeyboardInterrupt
    final = snapshot(done)
    save_checkpoint(folder, final)
    return final


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine down to 0."""
    rise = min((iteration + 1) / max(config.warmup, 1), 1.0)
    return config.learning_rate * rise * 0.5 * (1 + np.cos(np.pi * iteration / config.iterations))


@contextmanager
def _ctrl_c_between_steps() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until it is asked for: half a step must not end up in a checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread, whose business they then are
        return
    asked = False

    def note(number, frame):
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)  # a second one does not wait

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def check_fit(network: FlowNetwork, data: ImageData) -> None:
    """Raise DataError unless the data's states and classes are those the network is made for."""
    if data.shape != network.sample_shape:
        raise DataError(
            f"the network is made for states (C, H, W) = {network.sample_shape}; those of {data.name!r} are "
            f"{data.shape}"
        )
    if network.num_classes not in (None, len(data.class_names)):
        raise DataError(
            f"the network knows {network.num_classes} classes; {data.name!r} has {len(data.class_names)}"
        )


def _check_same_run(checkpoint: Checkpoint, network: dict, data: ImageData, settings: dict, folder: Path):
    was = {"network": checkpoint.network, "class_names": list(checkpoint.class_names)}
    now = {"network": network, "class_names": list(data.class_names)}
    was, now = _flat({**was, **checkpoint.settings}), _flat(json.loads(json.dumps({**now, **settings})))
    odd = [f"{k} was {was.get(k)!r}, is {now.get(k)!r}" for k in {**was, **now} if was.get(k) != now.get(k)]
    if odd:
        raise CheckpointError(
            f"{folder} holds a checkpoint with other settings ({'; '.join(odd)}); "
            "go on with the same, or use another folder"
        )


def _flat(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one level, keys joined by dots."""
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _restore(checkpoint, network, ema, optimizer) -> int:
    raw, moments = checkpoint.group("raw"), checkpoint.group("adam")
    if not raw:
        raise CheckpointError(
            "the checkpoint holds averaged weights only; it can be used but not trained further"
        )
    load_weights(network, raw, trained_only=True)
    for name, value in checkpoint.group("ema").items():
        ema[name].copy_(value)
    for name, parameter in network.named_parameters():
        if (
            parameter.requires_grad and f"exp_avg.{name}" in moments
        ):  # absent when it was saved before the first step
            optimizer.state[parameter] = {
                part: moments[f"{part}.{name}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
            }
    return checkpoint.iteration


def _log(folder: Path, start: int):
    return (folder / "log.jsonl").open("a" if start else "w", buffering=1)  # a line at a time, to be watched
