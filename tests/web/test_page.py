"""The page in a real Chromium, served as static files and by `piflow-edge serve`."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge.commands import bundles
from tests.commands.command_line import run
from tests.web.conftest import WEB

RUNTIME = WEB / "node_modules" / "onnxruntime-web" / "dist"
READY, DONE = {"step": "wait", "text": "^Ready"}, {"step": "wait", "text": "^Done"}


@pytest.fixture(scope="session")
def browse(node, tmp_path_factory):
    """A function that lets Chromium open a page and follow steps."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed")

    def run(url: str, *steps: dict, allowed: Sequence[str] = (), **more) -> dict:
        profile = tmp_path_factory.mktemp("profile")
        asked = {"program": program, "profile": str(profile), "url": url, "steps": steps, **more}
        done = subprocess.run(
            [node, Path(__file__).with_name("browse.mjs")], input=json.dumps(asked), capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert [error for error in seen["errors"] if not any(part in error for part in allowed)] == []
        origin = url.rstrip("/")
        assert all(
            other.startswith((origin, "blob:", "data:")) for other in seen["asked"]
        )  # nothing is sent elsewhere
        return seen

    return run


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextmanager
def serving_page(bundle: str, folder: Path):
    """The address of the page of a bundle as a folder that a plain web server serves."""
    run("web", bundle, "--out", folder, "--onnxruntime-web", RUNTIME)
    with serving_folder(folder) as address:
        yield address


@contextmanager
def serving_folder(folder: Path):
    """The address of a folder that a plain web server serves."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def site(node, tmp_path_factory):
    with serving_page("digits", tmp_path_factory.mktemp("site") / "site") as address:
        yield address


@pytest.fixture(scope="module")
def digits():
    with pf.load("digits") as generator:
        yield generator


def check_picture(seen: dict, generator: pf.Generator, label: int, **settings) -> None:
    """The canvas shows Python's picture, within one level."""
    expected = generator([label], output="numpy", **settings).images[0, ..., 0]
    pixels = np.reshape(seen["pixels"], (*reversed(seen["size"]), 4))
    assert (pixels[..., 3] == 255).all() and (pixels[..., 0] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0] - expected.astype(int)).max() <= 1


def test_it_draws_pythons_picture_also_offline_and_gives_it_with_its_recipe(browse, site, digits, tmp_path):
    draw = [{"step": "choose", "id": "subject", "title": "7"}, {"step": "fill", "id": "seed", "text": "5"}]
    seen = browse(
        site,
        {"step": "open"}, READY, *draw, {"step": "fill", "id": "nfe", "text": "3"}, {"step": "click", "id": "draw"},
        DONE, {"step": "read"}, {"step": "download", "file": str(tmp_path / "picture.png")},
        {"step": "offline"}, {"step": "open"}, READY, *draw, {"step": "click", "id": "draw"}, DONE, {"step": "read"},
    )  # fmt: skip
    online, offline = seen["saw"]
    check_picture(online, digits, 7, seed=5, nfe=3)
    check_picture(offline, digits, 7, seed=5)
    assert online["isIsolated"]  # so that WebAssembly may have threads
    assert online["label"] == "the picture of 7, seed 5"
    assert set(online["timings"]) == {"noise", "network", "policy", "decode", "total", "on this page"}
    recipe = pf.read_recipe(tmp_path / "picture.png")
    assert (recipe.seeds, recipe.settings.nfe, recipe.conditioning) == ([(5, 0)], 3, [{"label": 7}])


def test_the_keyboard_is_enough_and_a_phone_is_wide_enough(browse, site, digits):
    seen = browse(
        site,
        {"step": "open"}, READY, {"step": "focus", "id": "subject"}, {"step": "press", "key": "ArrowDown"},
        {"step": "press", "key": "Tab"}, {"step": "read"}, {"step": "press", "key": "Enter"}, DONE, {"step": "read"},
        viewport={"width": 360, "height": 640},
    )  # fmt: skip
    before, after = seen["saw"]
    assert before["focus"] == "seed" and not before["wide"]
    check_picture(after, digits, 1, seed=0)


def test_what_cannot_be_drawn_is_said(browse, site):
    seen = browse(
        site,
        {"step": "open"}, READY, {"step": "fill", "id": "nfe", "text": "1.5"}, {"step": "click", "id": "draw"},
        {"step": "read"},
    )  # fmt: skip
    assert seen["saw"][0]["label"] == "no picture yet"  # the form itself refuses half a network call


@pytest.fixture
def serving():
    """A function that serves digits by the command, and returns the address."""
    processes = []

    pytest.importorskip("starlette", reason="a server needs the 'serve' extra")

    def start(*options: str) -> str:
        command = [sys.executable, "-m", "piflow_edge.cli", "serve", "digits", "--port", "0", *options]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
        return processes[-1].stdout.readline().strip() + "/"

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=30)


def test_a_server_shows_it_and_draws_for_it(browse, serving, digits):
    steps = [
        {"step": "open"}, READY, {"step": "choose", "id": "subject", "title": "4"},
        {"step": "fill", "id": "nfe", "text": "2"}, {"step": "click", "id": "draw"}, DONE, {"step": "read"},
    ]  # fmt: skip
    seen = browse(serving(), *steps)
    check_picture(seen["saw"][0], digits, 4, seed=0, nfe=2)
    assert not [url for url in seen["asked"] if "/ort" in url or url.endswith((".wasm", ".onnx"))]


def test_a_server_with_a_key_is_asked_with_it_and_lets_a_browser_draw_itself(
    browse, serving, digits, tmp_path
):
    (file := tmp_path / "key").write_text("0123456789abcdef\n")
    key = [{"step": "fill", "id": "key", "text": "0123456789abcdef"}, {"step": "click", "id": "draw"}]
    seen = browse(
        serving("--api-key-file", str(file), "--onnxruntime-web", str(RUNTIME)),
        {"step": "open"}, READY, {"step": "click", "id": "draw"}, {"step": "wait", "text": "API key"}, *key, DONE,
        {"step": "read"}, {"step": "choose", "id": "place", "title": "in this browser (WebAssembly)"}, READY,
        {"step": "fill", "id": "seed", "text": "8"}, {"step": "click", "id": "draw"}, DONE, {"step": "read"},
        allowed=["401"],
    )  # fmt: skip
    on_server, in_browser = seen["saw"]
    check_picture(on_server, digits, 0, seed=0)
    check_picture(in_browser, digits, 0, seed=8)
    assert in_browser["isIsolated"]


def test_a_folder_that_stands_is_kept_and_missing_files_are_named(tmp_path):
    (tmp_path / "site").mkdir()
    for more, reason in [([], "--overwrite"), (["--overwrite"], "npm install onnxruntime-web")]:
        done = run("web", "digits", "--out", tmp_path / "site", "--onnxruntime-web", tmp_path, *more, code=2)
        assert reason in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "site"]


@pytest.mark.torch
def test_export_writes_the_page_of_a_student_itself(browse, tmp_path, monkeypatch):
    from piflow_edge.distill.loop.checkpoint import save_checkpoint
    from tests.conftest import make_student

    monkeypatch.setattr(bundles, "RUNTIME_OF_BROWSERS", RUNTIME)
    save_checkpoint(tmp_path / "student", make_student(nfe=1))
    command = [
        "export",
        tmp_path / "student",
        "--target",
        "web",
        "--name",
        "mine",
        "--out",
        tmp_path / "site",
    ]
    run(*command)
    steps = [{"step": "open"}, READY, {"step": "choose", "id": "subject", "title": "7"},
             {"step": "click", "id": "draw"}, DONE, {"step": "read"}]  # fmt: skip
    with serving_folder(tmp_path / "site") as address:
        (seen,) = browse(address, *steps)["saw"]
    run("export", tmp_path / "student", "--out", tmp_path / "bundle")
    with pf.load(tmp_path / "bundle") as generator:
        check_picture(seen, generator, 7, seed=0)
    monkeypatch.setattr(
        "piflow_edge.export.to_bundle.export_bundle", lambda *_, **__: pytest.fail("it was exported")
    )
    assert "site exists" in run(*command, code=2).stderr


@pytest.mark.torch
def test_it_draws_prompts(browse, text_folder, tmp_path):
    steps = [
        {"step": "open"}, READY, {"step": "fill", "id": "subject", "text": "a cat with a hat"},
        {"step": "fill", "id": "seed", "text": "6"}, {"step": "focus", "id": "subject"},
        {"step": "press", "key": "Enter"}, DONE, {"step": "read"},
    ]  # fmt: skip
    with serving_page(str(text_folder), tmp_path / "site") as address:
        (seen,) = browse(address, *steps)["saw"]
    with pf.load(text_folder) as generator:
        expected = generator("a cat with a hat", seed=6, output="numpy").images[0]
    pixels = np.reshape(seen["pixels"], (*reversed(seen["size"]), 4))[..., :3]
    assert np.abs(pixels - expected.astype(int)).max() <= 1
