"""The benchmark scripts run, at small sizes, and their page is made of what they found. No figure is judged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import HAS_TORCH

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not HAS_TORCH, reason="the benchmarks need the 'train' extra")


def answer_of(script, *arguments, out):
    """Run in this process: torch is here already, and a fresh one would spend its time on importing it."""
    import importlib

    module = importlib.import_module(f"benchmarks.{script}")
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

    def test_prompts(self, tmp_path, monkeypatch):
        pytest.importorskip("diffusers", reason="the decoder needs the 'diffusers' extra")
        pytest.importorskip("transformers")
        from benchmarks import prompts
        from tests.helpers.text_encoders import tiny_text_encoder, transformers_tokenizer

        tiny_text_encoder("bert").module.model.save_pretrained(tmp_path / "bert")
        transformers_tokenizer("wordpiece").save_pretrained(tmp_path / "bert")
        # Processes of their own would spend their time on imports.
        monkeypatch.setattr(prompts, "measure_peak", lambda bundle, keep: 1.0)
        settings = ("--text-encoder", tmp_path / "bert", "--small", "--rounds", 1)
        found = answer_of("prompts", *settings, out=tmp_path / "prompts.json")
        assert set(found["files_mb"]) == {
            "student.fp32.onnx", "encoder.bert.fp32.onnx", "decoder.fp32.onnx",
        }  # fmt: skip
        assert found["overhead"]["ratio_new"] > 0.5 and set(found["peak_mb"]) == {"all", "one"}

    def test_export_cost(self, tmp_path, monkeypatch):
        from benchmarks import export_cost

        monkeypatch.setattr(
            export_cost, "measure", export_cost.measure_here
        )  # each in its own would import torch
        found = answer_of(
            "export_cost", "--size", "tiny", "--stage", "fp32, fp16", out=tmp_path / "export_cost.json"
        )
        (line,) = found["lines"]
        assert line["parameters"] > 10_000 and 0 < line["before_mb"] <= line["peak_mb"]
        found["lines"].insert(
            0, {"size": "tiny", "stage": export_cost.PLAIN, **line, "cpu_seconds": 1.0, "seconds": 2.0}
        )
        found["lines"].append({"size": "tiny", "stage": "fp32", "failed": "exit status 1"})
        export_cost.add_ratios(found["lines"])
        (tmp_path / "export_cost.json").write_text(json.dumps(found))
        page(tmp_path, "export_cost", "exit status 1")

    def test_scaling(self, tmp_path):
        plot = tmp_path / "scaling.png"
        found = answer_of("scaling", "--small", "--rounds", 1, "--plot", plot, out=tmp_path / "scaling.json")
        assert [(line["what"], line["axis"]) for line in found["lines"]] == [
            ("rollout", "side"), ("rollout", "batch"), ("rollout", "components"), ("rollout", "substeps"),
            ("network", "side"), ("network", "batch"),
        ]  # fmt: skip
        assert plot.stat().st_size > 1000
        page(tmp_path, "scaling", "exponent")

    def test_rollout(self, tmp_path):
        quick = ("--size", "4,1,4,4", "--dx-size", "4,1,4,4", "--batch", 1, "--rounds", 1)
        found = answer_of("rollout", *quick, out=tmp_path / "rollout.json")
        assert [line["policy"] for line in found["lines"]] == ["gm", "dx"] and found["isa"]
        assert all(error < 1e-3 for line in found["lines"] for error in line["error"].values())
        page(tmp_path, "rollout", "over TorchScript")

    def test_training_step(self, tmp_path):
        quick = ("--nfe", 1, "--batch-size", 4, "--repeats", 1)
        found = answer_of("training_step", *quick, out=tmp_path / "training_step.json")
        assert found["lines"][0]["largest relative difference of the losses"] < 1e-3
        page(tmp_path, "training_step", "faster")


def test_startup(tmp_path):
    out = tmp_path / "startup.json"
    slow = ["import torch", "import diffusers"]
    command = [sys.executable, "-m", "benchmarks.startup", "--repeats", "1", "--out", out, "--skip", *slow]
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
    from benchmarks import precision

    calls = precision.time_calls(shared_bundle, [1, 2], 1)
    wide = {"graph_share": {"fp32": 1.0}, "psnr_db_to_pytorch": {"fp32": 90.0}, "calls": calls}
    (tmp_path / "precision.json").write_text(json.dumps({"command": "", "wide": wide}))
    page(tmp_path, "precision", "ms, batch 2")


def page(results, name, words):
    """The table of one result, which stands where its marks are and nowhere else."""
    from benchmarks.drawings import DRAWINGS
    from benchmarks.page import draw, rewrite

    text = rewrite(f"before\n<!-- {name} -->\nold\n<!-- end -->\nafter\n", results)
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and words in text and "| " in text
    if name in DRAWINGS:
        draw(results)
        assert f"](results/{name}.png)" in text and (results / f"{name}.png").stat().st_size > 1000


def test_every_figure_of_the_pages_is_made_from_a_result():
    import re

    from benchmarks.figures import SENTENCES, SEVERAL
    from benchmarks.page import PAGES, reword, rewrite

    results, several = BENCHMARKS / "results", set()
    for name in PAGES:
        text = (BENCHMARKS.parent / name).read_text(encoding="utf-8")
        names = re.findall(r"<!-- (\w+) -->", text)
        assert len(names) - names.count("end") == names.count("end")
        several |= set(names) & SEVERAL.keys()
        assert reword(name, rewrite(text, results), results) == text  # else: python -m benchmarks.page
    assert several == SEVERAL.keys() and {sentence.page for sentence in SENTENCES} < set(PAGES)


@pytest.mark.parametrize("file", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda file: file.stem)
def test_every_result_says_how_it_was_made(file):
    found = json.loads(file.read_text(encoding="utf-8"))
    command = found.get("command") or found["conditions"].get("command")
    if command is None:  # written down by hand, on another day
        assert len(found["conditions"]["source"]) > 20 and found["conditions"]["commit"]
        return
    # The commands of earlier commits are those of then.
    assert command.startswith(("python -m benchmarks.", "python benchmarks/", "piflow-edge evaluate "))
    assert "/tmp" not in command and "/home" not in command  # but what a reader has too


def test_a_sentence_gets_its_figures_and_must_be_there(tmp_path):
    from benchmarks.page import reword

    (tmp_path / "startup.json").write_text(json.dumps({"ms": {"first image": 1234.5}}))
    page = "from the start to the first image it was 0.5 s (see there)."
    assert reword("docs/faq.md", page, tmp_path) == page.replace("0.5", "1.23")
    assert reword("README.md", page, tmp_path) == page
    with pytest.raises(SystemExit, match=r"docs/faq\.md"):
        reword("docs/faq.md", "it was fast", tmp_path)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("fixed", [0.0, 20.0])
def test_a_known_exponent_is_found(power, fixed):
    from benchmarks.timing import growth

    sizes = np.array([1, 2, 4, 8, 16])
    times = fixed + 3.0 * sizes**power
    found = growth(sizes, times[:, None])
    assert found["exponent"] == pytest.approx(power, abs=0.01) and found["off"] < 0.01
    assert found["fixed"] == pytest.approx(fixed, abs=0.2)
    assert len(found["local"]) == 4 and (fixed or found["local"] == pytest.approx([power] * 4))
    random, inside = np.random.default_rng(0), 0
    for _ in range(20):
        found = growth(sizes, times[:, None] * np.exp(0.02 * random.standard_normal((5, 15))), draws=60)
        inside += found["low"] - 0.01 < power < found["high"] + 0.01
    assert inside >= 15  # of 20, where 19 are to be expected


def test_three_sizes_tell_no_fixed_cost():
    from benchmarks.timing import growth

    found = growth([1, 2, 4], [[3.0], [6.0], [12.0]])
    assert found["fixed"] == 0 and found["exponent"] == pytest.approx(1, abs=0.01)


def test_contenders_take_turns():
    from benchmarks.timing import rounds_of

    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    table = rounds_of(calls, 5, warmup=1)
    assert [len(times) for times in table.values()] == [5, 5]
    assert seen[:2] == ["a", "b"] and all(set(seen[2 + 2 * i : 4 + 2 * i]) == {"a", "b"} for i in range(5))
    assert len(rounds_of(calls, 100, 0.0)["a"]) == 3
