"""How far a long job has come: one bar on a terminal, a plain line now and then everywhere else; on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ways to tell it. "auto" is a bar where somebody is looking at a terminal, and plain lines elsewhere.
PROGRESS_MODES = ("auto", "bar", "plain", "json", "quiet")
# Seconds between two lines in a log: often enough to see that a job lives, seldom enough to read.
_LINE_EVERY = 15.0

_mode = "auto"


def set_progress_mode(mode: str) -> None:
    """Choose how all long jobs of this process tell how far they are: one of `PROGRESS_MODES`."""
    global _mode
    if mode not in PROGRESS_MODES:
        raise ValueError(f"progress is told in one of {', '.join(PROGRESS_MODES)}; got {mode!r}")
    _mode = mode


def announce(line: str) -> None:
    """Tell where a job leaves what it makes, in a line of its own; not where only progress is read, or nothing."""
    if _mode not in ("json", "quiet"):
        print(line, file=sys.stderr, flush=True)


def shows_bars() -> bool:
    """Return True where progress is a bar on a terminal, and not lines or nothing."""
    return _mode == "bar" or (_mode == "auto" and sys.stderr.isatty())


@contextmanager
def progress(
    title: str, total: int, *, start: int = 0, is_long: bool = True
) -> Iterator[Callable[..., None]]:
    """Tell how far a job of `total` steps is; the yielded function takes one step, with a remark beside it.

    `is_long`: False where nobody has to wait for this one, of which nothing is told.
    """
    if is_long and shows_bars():
        with _bar(title, total, start) as advance:
            yield advance
        return
    lines = _Lines(title, total, start, as_json=_mode == "json")
    if _mode == "quiet" or not is_long:
        yield lines.count
        return
    yield lines.advance
    lines.end()


class _Lines:
    """Plain lines, or lines of JSON, for a log that somebody follows."""

    def __init__(self, title: str, total: int, start: int, *, as_json: bool):
        self._title, self._total, self._start, self._as_json = title, total, start, as_json
        self._done, self._remark = start, ""
        self._told_done = start  # steps that the last line spoke of
        self._began = self._told = time.monotonic()

    def count(self, remark: str = "") -> None:
        """Take a step."""
        self._done, self._remark = self._done + 1, remark

    def advance(self, remark: str = "") -> None:
        """Take a step, and tell of it if the last line is old."""
        self.count(remark)
        if time.monotonic() - self._told >= _LINE_EVERY:
            self._tell()

    def end(self) -> None:
        """Tell where it ended; a job without steps says nothing."""
        if self._done > self._start and self._told_done != self._done:
            self._tell()

    def _tell(self) -> None:
        self._told, self._told_done = time.monotonic(), self._done
        steps, seconds = self._done - self._start, self._told - self._began
        rate = steps / seconds if seconds else 0.0
        left = (self._total - self._done) / rate if rate else 0.0
        line = f"{self._title}: {self._done} of {self._total}"
        if self._as_json:
            said = {"title": self._title, "done": self._done, "total": self._total, "per_second": rate}
            import json  # late: `--help` needs none

            line = json.dumps({**said, "seconds_left": left, "remark": self._remark})
        elif self._done < self._total:
            line += f" ({self._done / self._total:.0%}), {rate:.3g} per s, {_clock(left)} left"
        if not self._as_json and self._remark:
            line += f", {self._remark}"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def _bar(title: str, total: int, start: int) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    # A terminal, since the caller says so: rich's own guess knows of fewer.
    console = Console(stderr=True, force_terminal=True)
    remark = ""
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=start, remark="")

        def advance(new_remark: str = "") -> None:
            nonlocal remark
            remark = new_remark
            bar.update(task, advance=1, remark=remark)

        yield advance
    if total > start:
        print(f"{title}: {total} of {total} {remark}".rstrip(), file=sys.stderr)
