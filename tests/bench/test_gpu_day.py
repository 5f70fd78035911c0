"""What a GPU machine is asked by gpu_day.sh, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from piflow_edge.kernels import cuda
from tests.helpers.pretended_gpu import ROOT

pytest.importorskip("torch")
from benchmarks import gpu_day


@pytest.mark.torch
def test_pytorch_is_timed_and_what_it_cannot_do_is_named(tmp_path, monkeypatch):
    import torch

    def cannot(call):
        raise RuntimeError("no compiler\nand a long story")

    def compiled(call):
        return lambda: cannot(call)

    monkeypatch.setattr(torch, "compile", compiled)
    found = gpu_day.time_torch(tmp_path, sizes=("tiny",), device="cpu")
    assert [line["dtype"] for line in found["lines"]] == ["float32", "float16"]
    for line in found["lines"]:
        assert line["ms"]["eager"] > 0 and line["ms"]["compiled"] is None
        assert line["failed"] == {"compiled": "no compiler"}
    assert json.loads((tmp_path / "torch.json").read_text())["lines"] == found["lines"]


@pytest.mark.torch
def test_bundles_are_made_once_and_processes_that_draw_from_them_end_well(tmp_path):
    sizes = {"small": ("tiny", ("fp32",))}
    assert set(gpu_day.make_bundles(tmp_path, sizes)["seconds"]) == {"small"}
    assert gpu_day.make_bundles(tmp_path, sizes)["seconds"] == {}
    found = gpu_day.try_exits(tmp_path, engines=["ort-cpu"], runs=1)
    assert found["all_clean"] and [line["bundle"] for line in found["lines"]] == ["digits"]
    (tmp_path / "digits" / "bundle.json").write_text("{}")
    found = gpu_day.try_exits(tmp_path, engines=["ort-cpu"], runs=1)
    assert not found["all_clean"] and found["lines"][0]["status"] == 1


@pytest.mark.skipif(cuda.missing() is None, reason="there is a GPU")
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_a_part_that_fails_stops_no_other(tmp_path):
    command = [ROOT / "benchmarks" / "gpu_day.sh", tmp_path / "out", "torch", "kernels"]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(list(map(str, command)), env=environment, capture_output=True, check=True)
    ended = json.loads((tmp_path / "out" / "gpu_day.json").read_text())
    assert {name: part["status"] for name, part in ended.items()} == {"kernels": 2, "torch": 2}
