"""The installed wheel in an environment without torch: what an app developer gets.

`make test` makes that environment and names its interpreter in PIFLOW_EDGE_RUNTIME_PYTHON.
"""

import json
import os
import subprocess

import numpy as np
import pytest

PYTHON = os.environ.get("PIFLOW_EDGE_RUNTIME_PYTHON")
pytestmark = [
    pytest.mark.runtime,
    pytest.mark.torch,  # the bundle is made by the environment that runs the tests
    pytest.mark.skipif(not PYTHON, reason="PIFLOW_EDGE_RUNTIME_PYTHON is not set; `make test` sets it"),
]


def run(code, *arguments):
    # -I: neither this directory nor PYTHONPATH, so that the installed wheel is what is tried.
    command = [PYTHON, "-I", "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_wheel_puts_nothing_but_its_package_into_site_packages():
    tops = run(
        "import json; from importlib.metadata import files;"
        "print(json.dumps(sorted({f.parts[0] for f in files('piflow-edge') if f.parts[0] != '..'})))"
    )
    assert [top for top in tops if not top.endswith(".dist-info")] == ["piflow_edge"]


def test_there_is_no_torch_and_nothing_of_the_train_extra():
    absent = ["torch", "onnx", "onnxscript", "safetensors", "accelerate", "sklearn", "scipy", "diffusers"]
    found = run(
        "import json, sys; from importlib.util import find_spec;"
        "print(json.dumps([m for m in sys.argv[1:] if find_spec(m)]))",
        *absent,
    )
    assert found == []


def test_it_makes_the_same_images(shared_bundle, tmp_path):
    import piflow_edge as pf

    out = tmp_path / "latents.npy"
    answer = run(
        "import json, sys, numpy, piflow_edge as pf;"
        "r = pf.load(sys.argv[1])(labels=[3, '7'], seed=5); numpy.save(sys.argv[2], r.latents);"
        "print(json.dumps([r.engine, r.device, len(r.images), 'torch' in sys.modules]))",
        shared_bundle,
        out,
    )
    assert answer == ["ort-cpu", "cpu", 2, False]
    here = pf.load(shared_bundle)([3, 7], seed=5, output="latent").latents
    np.testing.assert_allclose(np.load(out), here, rtol=0, atol=1e-6)


def test_the_first_images_need_no_training():
    answer = run(
        "import json, piflow_edge as pf;"
        "r = pf.load(pf.demo_bundle())(labels=[3, 7], seed=0);"
        "print(json.dumps([r.engine, [i.size for i in r.images]]))"
    )
    assert answer == ["ort-cpu", [[8, 8], [8, 8]]]


def test_it_decodes_latents(latent_bundle, tmp_path):
    import piflow_edge as pf

    out = tmp_path / "images.npy"
    answer = run(
        "import json, sys, numpy, piflow_edge as pf;"
        "r = pf.load(sys.argv[1])(labels=[3, 7], seed=5, output='numpy'); numpy.save(sys.argv[2], r.images);"
        "print(json.dumps([m for m in ('torch', 'diffusers') if m in sys.modules]))",
        latent_bundle,
        out,
    )
    assert answer == []
    here = pf.load(latent_bundle)([3, 7], seed=5, output="numpy").images
    assert np.abs(np.load(out).astype(int) - here).max() <= 1  # rounded the other way


@pytest.mark.parametrize("kind", ["shared_bundle", "latent_bundle"])
def test_verify_passes_there(kind, request):
    command = [PYTHON, "-I", "-m", "piflow_edge.cli", "verify", str(request.getfixturevalue(kind)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


def test_training_commands_name_the_missing_extra(tmp_path):
    command = [PYTHON, "-I", "-m", "piflow_edge.cli", "distill", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'piflow-edge[train]'" in done.stderr
