"""An app that PyInstaller packed from the installed wheel, with plain `pyinstaller app.py`, runs where no Python is."""

import json
import os
import subprocess
import sys
import sysconfig

import pytest

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
    import piflow_edge as pf

    (tmp_path / "app.py").write_text(APP)
    # Without TensorRT's engine, as somebody packs it who wants a small app.
    command = [PYTHON, "-I", "-m", "PyInstaller", "--log-level", "WARN", "--exclude-module",
               "piflow_edge.engines.trt", "app.py"]  # fmt: skip
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    app, alone = tmp_path / "dist" / "app" / "app", {"PATH": "/nowhere", "HOME": str(tmp_path)}
    done = subprocess.run([app, tmp_path / "3.png"], cwd="/", env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    engine, missing, told, emoji, frozen = json.loads(done.stdout)
    assert (engine, missing, emoji, frozen) == ("ort-cpu", None, "emoji", True)
    assert "'tensorrt' is not part of this program" in told
    with pf.load("digits") as generator:
        generator([3], seed=7).save(tmp_path / "here.png")
    assert (tmp_path / "3.png").read_bytes() == (tmp_path / "here.png").read_bytes()
