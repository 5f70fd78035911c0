"""What a run tells: a progress bar, `log.jsonl`, TensorBoard when asked for, and pictures of samples."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from piflow_edge.errors import MissingExtraError
from piflow_edge.system.files import write_atomic
from piflow_edge.system.progress import announce, progress
from piflow_edge.system.sheets import as_pil, encode_png, titled_grid

from .curves import describe_trend, draw_curves, read_curves

# Pictures in a row of a sample sheet.
_COLUMNS = 10


class Journal:
    """Tells of each step what there is to tell. Made by `open_journal`."""

    def __init__(self, folder: Path, config, run, start: int, bar, log, board):
        self.folder, self.config, self.run, self.start = folder, config, run, start
        self.bar, self.log, self.board = bar, log, board
        self.began = time.perf_counter()
        self.titles: Sequence[str] = ()  # of the pictures on sheets
        self.errors: dict[int, float] = {}  # to the teacher, by iteration

    def step(self, done: int, loss: float, norm: float, learning_rate: float, skipped: int) -> None:
        """Tell of one step; `done` counts it."""
        speed = (done - self.start) * self.config.batch_size / (time.perf_counter() - self.began)
        error = f", error to the teacher {list(self.errors.values())[-1]:.4f}" if self.errors else ""
        skips = f", {skipped} steps skipped" if skipped else ""
        self.bar(f"loss {loss:.4f}{error}, {speed:.0f} images/s{skips}")
        if done % self.run.log_every and done < self.config.iterations:
            return
        line = {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate, "skipped": skipped}
        line |= {"images_per_s": speed}
        self._write(done, line)

    def compare(self, done: int, error: float) -> None:
        """Tell how far the student's images are from the teacher's."""
        self.errors[done] = error
        self._write(done, {"error_to_teacher": error})

    def _write(self, done: int, line: dict[str, float]) -> None:
        # JSON knows no NaN and no infinity.
        numbers = {name: value if math.isfinite(value) else None for name, value in line.items()}
        self.log.write(json.dumps({"iteration": done, **numbers}) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if value is not None:
                    self.board.add_scalar(name, value, done)

    def sum_up(self) -> None:
        """Draw the curves, and tell what they say, at the end of a run or where it is stopped."""
        draw_curves(self.folder / "log.jsonl", self.folder / "curves.png")
        if said := describe_trend(self.errors):
            announce(said)

    def pictures(self, done: int, images: np.ndarray) -> None:
        """Keep images, uint8 (B, H, W, C), as `samples/<iterations>.png`."""
        sheet = titled_grid(as_pil(images), self.titles, _COLUMNS)
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{done:07d}.png", encode_png(sheet))
        if self.board is not None:
            self.board.add_image("samples", np.asarray(sheet), done, dataformats="HWC")


@contextmanager
def open_journal(folder: Path, title: str, config, run, start: int, remark: str = "") -> Iterator[Journal]:
    """A journal in `folder` of a run that begins, or goes on, after `start` iterations; see `train` for the others."""
    with ExitStack() as stack:
        board = None
        if run.tensorboard:
            # What a killed run told after its last checkpoint is told again.
            board = summary_writer()(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
            stack.callback(board.close)
        announce(
            f"{title}: from iteration {start} to {config.iterations}; figures go to {folder / 'log.jsonl'}"
            + (remark and f"; {remark}")
        )
        bar = stack.enter_context(progress(title, config.iterations, start=start))
        log = stack.enter_context(_open_log(folder / "log.jsonl", start))
        journal = Journal(folder, config, run, start, bar, log, board)
        journal.errors = read_curves(folder / "log.jsonl").get("error_to_teacher", {})
        stack.callback(journal.sum_up)
        yield journal


def _open_log(path: Path, start: int):
    """The log with its lines up to iteration `start`, to be added to a line at a time, so that it can be watched."""
    lines = []
    if start and path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["iteration"] <= start:
                    lines.append(line + "\n")
            except ValueError:  # cut off when the run was killed
                continue
    write_atomic(path, "".join(lines).encode())
    return path.open("a", buffering=1)


def summary_writer():
    """TensorBoard's writer.

    Raises:
        MissingExtraError: neither of the packages that have one is installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise MissingExtraError(
                "--tensorboard needs 'tensorboard'; get it with: pip install 'piflow-edge[tensorboard]'"
            ) from None
    return SummaryWriter
