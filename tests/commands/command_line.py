"""Commands of piflow-edge as tests call them; both ways give `stdout` and `stderr` and check the exit code."""

import inspect
import subprocess
import sys

from click.testing import CliRunner

from piflow_edge.cli import main

# Before click 8.2 its runner mixes the two unless it is told not to.
APART = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}


def run(*arguments, code=0):
    """In this process, where torch is loaded once and nothing is exported twice. Warnings go to `caplog`."""
    done = CliRunner(**APART).invoke(main, list(map(str, arguments)))
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done


def run_process(*arguments, code=0):
    """In a process of its own, as a shell does it."""
    command = [sys.executable, "-m", "piflow_edge.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done
