"""The example of a desktop app, in a real window on a display that nobody sees."""

import gc
import os
import shutil
import subprocess
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

import piflow_edge as pf

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "desktop.py"
tkinter = pytest.importorskip("tkinter", reason="this Python was built without Tk")
pytestmark = [
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the documentation is not here"),
    pytest.mark.skipif(not shutil.which("Xvfb"), reason="there is no Xvfb to open a window on"),
]


@pytest.fixture(scope="module")
def display():
    """The name of an X server's display, which the server picks and says on a pipe."""
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "800x800x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    with os.fdopen(read) as pipe:
        yield f":{pipe.readline().strip()}"
    server.terminate()
    server.wait()


@pytest.fixture
def window(display, monkeypatch):
    """Open the example's window on a bundle, and close it again."""
    monkeypatch.setenv("DISPLAY", display)
    spec = spec_from_file_location("desktop", EXAMPLE)
    desktop = module_from_spec(spec)
    spec.loader.exec_module(desktop)
    opened = []

    def open_window(bundle):
        opened.append(desktop.Window(tkinter.Tk(), desktop.Worker(bundle)))
        monkeypatch.setattr(desktop.messagebox, "showerror", lambda title, text: opened[0].status.set(text))
        return opened[0]

    yield open_window
    for one in opened:
        one.close()
        one.worker.join(timeout=30)
        assert not one.worker.is_alive()
    # Tk aborts a process in which another thread collects what is left of a window.
    opened.clear()
    gc.collect()


def wait(window, condition):
    """Let the window live until something holds."""
    latest = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < latest, window.status.get()
        window.root.update()
        time.sleep(0.005)


def is_enabled(window, button):
    return str(window.buttons[button]["state"]) == "normal"


def test_what_is_typed_is_drawn_and_saved(window, tmp_path, monkeypatch):
    window = window("digits")
    wait(window, lambda: is_enabled(window, "Draw"))
    shown = []
    show = window._when_preview
    monkeypatch.setattr(window, "_when_preview", lambda preview: (shown.append(preview), show(preview)))
    window.prompt.set("7")
    window.seed.set("5")
    window.root.event_generate("<Return>")
    wait(window, lambda: window.result is not None)
    with pf.load("digits") as generator:
        expected = generator(labels=[7], seed=5)
    assert np.array_equal(np.asarray(window.result.images[0]), np.asarray(expected.images[0]))
    shares = [share for _, share in shown]
    assert len(shares) == 8 and shares == sorted(shares) and shares[-1] == 1 == window.bar["value"]
    monkeypatch.setattr("tkinter.filedialog.asksaveasfilename", lambda **options: str(tmp_path / "7.png"))
    window.buttons["Save"].invoke()
    assert pf.read_recipe(tmp_path / "7.png").seeds == [(5, 0)]


def test_a_file_that_cannot_be_written_is_said(window, tmp_path, monkeypatch):
    window = window("digits")
    wait(window, lambda: is_enabled(window, "Draw"))
    window.prompt.set("1")
    window.draw()
    wait(window, lambda: is_enabled(window, "Save"))
    for name, words in {"1.gif": ".png", "nowhere/file/1.png": "file"}.items():
        (tmp_path / "nowhere").write_bytes(b"") if "/" in name else None
        monkeypatch.setattr(
            "tkinter.filedialog.asksaveasfilename", lambda name=name, **_: str(tmp_path / name)
        )
        window.save()
        assert words in window.status.get() and "saved" not in window.status.get()


def test_a_mistake_is_shown_and_the_next_picture_drawn(window):
    window = window("digits")
    wait(window, lambda: is_enabled(window, "Draw"))
    window.prompt.set("eleven")
    window.draw()
    wait(window, lambda: "'eleven'" in window.status.get())
    window.prompt.set("1")
    window.draw()
    wait(window, lambda: window.result is not None)


def test_a_picture_is_stopped(window, monkeypatch):
    window = window("digits")
    wait(window, lambda: is_enabled(window, "Draw"))
    monkeypatch.setattr(window, "_when_preview", lambda preview: window.stop())
    window.prompt.set("1")
    window.calls.set("4")
    window.worker.orders.put({"subject": "1", "nfe": 4, "substeps": 200_000})
    wait(window, lambda: window.status.get() == "stopped")
    assert is_enabled(window, "Draw") and window.result is None


def test_a_bundle_that_is_not_there_is_said_and_ends(window, tmp_path):
    window = window(str(tmp_path / "nothing"))
    said = []
    window.status.trace_add("write", lambda *event: said.append(window.status.get()))
    wait(window, lambda: window.is_closed)
    assert "there is nothing at" in said[-1]
