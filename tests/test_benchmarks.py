"""The benchmark scripts run, at small sizes, and their page is made of what they found. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import HAS_TORCH

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not HAS_TORCH, reason="the benchmarks need the 'train' extra")


def answer_of(script, *arguments, out):
    """Run in this process: torch is here already, and a fresh one would spend its time on importing it."""
    import importlib

    module = importlib.import_module(script)
    module.main([*map(str, arguments), "--out", str(out)])
    return json.loads(out.read_text())


class TestScripts:
    def test_rollout_share(self, tmp_path):
        found = answer_of(
            "rollout_share", "--small", "--rounds", 1, "--nfe", 1, out=tmp_path / "rollout_share.json"
        )
        assert [line["substeps"] for line in found["lines"]] == [32, 128] * 2
        assert all(0 < line["share"] < 1 for line in found["lines"])
        page(tmp_path, "rollout_share", "policy's share")

    def test_end_to_end(self, tmp_path):
        pytest.importorskip("diffusers", reason="the rival pipeline needs the 'diffusers' extra")
        found = answer_of(
            "end_to_end", "--small", "--rounds", 1, "--steps", 3, out=tmp_path / "end_to_end.json"
        )
        (line,) = found["lines"]
        assert set(line["worst_difference_of_images"]) == {"ONNX Runtime", "PyTorch", "diffusers"}
        assert line["speedup / ratio of calls"] == pytest.approx(2 * line["speedup / ratio of sample runs"])
        page(tmp_path, "end_to_end", "in diffusers")

    def test_scaling(self, tmp_path):
        plot = tmp_path / "scaling.png"
        found = answer_of("scaling", "--small", "--rounds", 1, "--plot", plot, out=tmp_path / "scaling.json")
        assert [(line["what"], line["axis"]) for line in found["lines"]] == [
            ("rollout", "side"), ("rollout", "batch"), ("rollout", "components"), ("rollout", "substeps"),
            ("network", "side"), ("network", "batch"),
        ]  # fmt: skip
        assert plot.stat().st_size > 1000
        page(tmp_path, "scaling", "exponent")


def test_startup(tmp_path):
    out = tmp_path / "startup.json"
    slow = ["import torch", "import diffusers"]
    command = [sys.executable, BENCHMARKS / "startup.py", "--repeats", "1", "--out", out, "--skip", *slow]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text())
    assert found["import piflow_edge / import numpy"] > 0
    page(tmp_path, "startup", "budget")


def test_noise(shared_bundle, tmp_path):
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "digits-nfe1").symlink_to(shared_bundle)
    found = answer_of(
        "noise", "--demo", tmp_path, "--runs", 2, "--rounds", 2, "--batch", 1, out=tmp_path / "noise.json"
    )
    assert found["comparisons"] == 1 and found["false_alarms"] <= 1
    page(tmp_path, "noise", "though nothing did")


def test_precision_tables_read_what_is_timed(shared_bundle, tmp_path):
    import precision

    calls = precision.timed(shared_bundle, [1, 2], 1)
    wide = {"graph_share": {"fp32": 1.0}, "psnr_db_to_pytorch": {"fp32": 90.0}, "calls": calls}
    (tmp_path / "precision.json").write_text(json.dumps({"command": "", "wide": wide}))
    page(tmp_path, "precision", "ms, batch 2")


def page(results, name, words):
    """The table of one result, which stands where its marks are and nowhere else."""
    from page import rewrite

    text = rewrite(f"before\n<!-- {name} -->\nold\n<!-- end -->\nafter\n", results)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and words in text and "| " in text


def test_every_table_of_the_page_is_made_from_a_result():
    import re

    from page import rewrite

    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- (\w+) -->", text)
    assert len(names) - names.count("end") == names.count("end") > 8
    assert rewrite(text, BENCHMARKS / "results") == text  # else: python benchmarks/page.py


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_known_exponent_is_found(power):
    from timing import exponent

    sizes = [1, 2, 4, 8, 16]
    found = exponent(sizes, [3 * size**power for size in sizes])
    assert found["exponent"] == pytest.approx(power) and found["last"] == pytest.approx(power)
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        noisy = [3 * size**power * np.exp(0.1 * random.standard_normal()) for size in sizes]
        found = exponent(sizes, noisy)
        inside += found["low"] < power < found["high"]
    assert 180 < inside < 200


def test_contenders_take_turns():
    from timing import rounds_of

    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    table = rounds_of(calls, 5, warmup=1)
    assert [len(times) for times in table.values()] == [5, 5]
    assert seen[:2] == ["a", "b"] and all(set(seen[2 + 2 * i : 4 + 2 * i]) == {"a", "b"} for i in range(5))
    assert len(rounds_of(calls, 100, 0.0)["a"]) == 3
