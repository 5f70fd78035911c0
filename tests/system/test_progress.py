"""How far a long job has come, where nobody looks at a terminal."""

import json
import sys

import click
import pytest
from click.testing import CliRunner

from piflow_edge.commands.options import add_progress_options, command
from piflow_edge.system import progress as told
from piflow_edge.system.progress import announce, progress, set_progress_mode, shows_bars


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test turns on by hand."""
    seconds = [100.0]
    monkeypatch.setattr(told.time, "monotonic", lambda: seconds[0])
    yield seconds
    set_progress_mode("auto")


def run(clock, mode, total=4, start=0, seconds=10.0):
    """A job whose steps take `seconds` each."""
    set_progress_mode(mode)
    with progress("working", total, start=start) as advance:
        for step in range(start, total):
            clock[0] += seconds
            advance(f"loss {step}")


def test_off_a_terminal_a_line_comes_every_fifteen_seconds(clock, capsys):
    run(clock, "auto")
    assert capsys.readouterr().err.splitlines() == [
        "working: 2 of 4 (50%), 0.1 per s, 0:00:20 left, loss 1",
        "working: 4 of 4, loss 3",
    ]


def test_what_was_done_before_is_no_part_of_the_rate(clock, capsys):
    run(clock, "plain", total=1004, start=1000, seconds=20)
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "working: 1001 of 1004 (100%), 0.05 per s, 0:01:00 left, loss 1000"


def test_lines_of_json_hold_the_same(clock, capsys):
    run(clock, "json", seconds=20)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {
        "title": "working", "done": 1, "total": 4, "per_second": 0.05, "seconds_left": 60.0, "remark": "loss 0",
    }  # fmt: skip
    assert [line["done"] for line in lines] == [1, 2, 3, 4]


def test_quiet_is_quiet(clock, capsys):
    run(clock, "quiet")
    announce("figures go to log.jsonl")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(clock, "auto")
    shown = capsys.readouterr().err
    assert "\x1b[" in shown and shown.splitlines()[-1].endswith("working: 4 of 4 loss 3")


@pytest.mark.parametrize(
    ("mode", "bars"), [("auto", True), ("bar", True), ("plain", False), ("quiet", False)]
)
def test_a_bar_on_a_terminal_is_for_who_wants_one(clock, monkeypatch, mode, bars):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    set_progress_mode(mode)
    assert shows_bars() == bars


def test_a_job_that_fails_does_not_say_that_it_ended(clock, capsys):
    set_progress_mode("plain")
    with pytest.raises(ValueError), progress("working", 3) as advance:
        advance()
        raise ValueError
    assert capsys.readouterr().err == ""


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="bar, plain, json, quiet; got 'loud'"):
        set_progress_mode("loud")


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ([], "auto"),
        (["--progress", "json"], "json"),
        (["--quiet"], "quiet"),
        (["--progress", "bar", "--quiet"], "quiet"),
    ],
)
def test_the_command_line_chooses(clock, given, mode):
    @command()
    def work():
        click.echo(told._mode)

    add_progress_options(work)
    set_progress_mode("plain")  # what an earlier command of the process left
    assert CliRunner().invoke(work, given).output == f"{mode}\n"
