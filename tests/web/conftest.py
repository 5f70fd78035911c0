"""The JavaScript package, run by Node.js; skipped where Node.js or its packages are missing."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WEB = ROOT / "piflow_edge" / "web"


@pytest.fixture(scope="session")
def node():
    """Node.js, with the packages that `make web` installs."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("Node.js is not installed")
    if not (WEB / "node_modules" / "onnxruntime-web").is_dir():
        pytest.skip("the JavaScript packages are not installed; make web does it")
    return program


@pytest.fixture(scope="session")
def ask(node):
    """A function that runs commands of driver.mjs in one process, and returns their answers."""

    def run(*commands: dict) -> list:
        done = subprocess.run(
            [node, str(Path(__file__).with_name("driver.mjs"))],
            input=json.dumps(commands), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A small bundle that reads prompts; exported as tests/export/test_text_bundle.py does, so that it is made once."""
    pytest.importorskip("torch", reason="making a bundle needs the 'train' extra")
    pytest.importorskip("transformers", reason="a text encoder needs transformers")
    from piflow_edge.export.to_bundle import export_bundle
    from tests.export.test_text_bundle import make_text_student
    from tests.helpers.text_encoders import tiny_text_encoder

    folder, encoders = tmp_path_factory.mktemp("bundles") / "text", [tiny_text_encoder("bert")]
    export_bundle(make_text_student(), folder, encoders=encoders, precisions=("fp32", "fp16"))
    return folder


def as_floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.float32)
