"""The GPU benchmark's logic, on the CPU's engine and on a pretended GPU; its figures need a real one."""

import json
import subprocess
import sys

import numpy as np
import pytest

from piflow_edge.kernels import cuda
from tests.helpers.pretended_gpu import ROOT, fake_driver, run_on_fake_driver
from tests.helpers.pretended_tensorrt import START

SCRIPT = ROOT / "benchmarks" / "gpu_engines.py"
pytestmark = pytest.mark.torch


def run(*words, code=0):
    command = [sys.executable, SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.skipif(cuda.missing() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so(shared_bundle):
    assert "need an NVIDIA GPU" in run("--bundle", shared_bundle, code=2).stderr


def test_an_engine_that_agrees_is_timed_and_written(shared_bundle, tmp_path):
    out = tmp_path / "result.json"
    run("--bundle", shared_bundle, "--engine", "ort-cpu", "--batch", 1, 3, "--repeats", 2, "--out", out)
    result = json.loads(out.read_text())
    (line,) = result["lines"]
    assert (
        result["all_agree"] and line["agreement"]["3"]["outputs"] <= line["agreement"]["3"]["outputs_allowed"]
    )
    assert set(line["ms"]) == {"network", "images"} and line["ms"]["network"].keys() == {"1", "3"}
    assert line["build"] is None and result["versions"]["numpy"] == np.__version__


def test_an_engine_that_computes_something_else_is_found_out(shared_bundle):
    import piflow_edge as pf
    from benchmarks import gpu_engines

    reference, other = pf.load(shared_bundle, engine="ort-cpu"), pf.load(shared_bundle, engine="ort-cpu")
    assert gpu_engines.agreement(other, reference, 2)["agrees"]
    run_rightly = other.engine.run
    other.engine.run = lambda inputs: {name: value * 1.01 for name, value in run_rightly(inputs).items()}
    found = gpu_engines.agreement(other, reference, 2)
    assert not found["agrees"] and found["outputs"] == pytest.approx(0.01, rel=0.1)
    other.engine.run = lambda inputs: {name: value * np.nan for name, value in run_rightly(inputs).items()}
    assert gpu_engines.agreement(reference, reference, 2)["agrees"]
    assert not gpu_engines.agreement(other, reference, 2)["agrees"]


def test_tensorrt_is_built_held_to_the_cpu_and_timed(shared_bundle, tmp_path):
    pytest.importorskip("filelock")
    driver = fake_driver(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(START)
    words = ("--bundle", shared_bundle, "--engine", "tensorrt", "--batch", 1, 2, "--repeats", 2)
    done = run_on_fake_driver(driver, SCRIPT, *words, PYTHONPATH=f"{tmp_path}:{ROOT}")
    result = json.loads(done.stdout)
    (line,) = result["lines"]
    assert result["all_agree"] and result["gpu"] == "Pretended GPU"
    assert line["build"][0]["built_now"] and line["build"][0]["key"]["profile"] == "1:2:2"
    assert set(line["ms"]) == {"network", "images", "network on the GPU"}
