"""One progress bar for every long job: on stderr, and only where somebody is looking."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, total: int, *, start: int = 0) -> Iterator[Callable[[str], None]]:
    """A bar that the yielded function moves on by one step, with a remark beside it.

    Shown on stderr when that is a terminal; elsewhere one line when it ends.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    console = Console(stderr=True)
    shown = console.is_terminal
    remark = ""
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=start, remark="")

        def advance(new_remark: str = "") -> None:
            nonlocal remark
            remark = new_remark
            bar.update(task, advance=1, remark=remark)

        yield advance
    if total > start:
        print(f"{title}: {total} of {total} {remark}".rstrip(), file=sys.stderr)
