"""The comparison of methods, on a data set and networks so small that it takes seconds."""

import json

import numpy as np
import pytest

from benchmarks import quality
from piflow_edge.distill.loop.checkpoint import load_checkpoint

# PyTorch's own, at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

TEACHER = "--teacher-iterations 5 --teacher-batch-size 8 --patch 4 --width 16 --depth 1 --heads 2"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of noisy colour images, 16 x 16, in blocks of two pixels."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 100, (60, 8, 8, 3)) + 100 * labels[:, None, None, None]
    file = tmp_path_factory.mktemp("data") / "blocks.npz"
    blocks = images.repeat(2, 1).repeat(2, 2).astype(np.uint8)
    np.savez(file, images=blocks, labels=labels, class_names=np.array(["dark", "light"]))
    return file


def arguments(source, out, more):
    return f"--data {source} --size 8 --out {out} --images 100 --batch-size 8 {TEACHER} {more}".split()


def test_images_are_averaged_down(source, tmp_path):
    data = quality.sized_data(str(source), 8, tmp_path)
    with np.load(source) as arrays:
        small = arrays["images"][:, ::2, ::2].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data.images, small)
    assert data.conditioner.names == ("dark", "light")
    np.testing.assert_array_equal(quality.sized_data(str(source), 8, tmp_path).images, small)


def test_a_comparison_ends_in_a_table_and_goes_on_where_it_was(source, tmp_path, capsys):
    methods = "--nfe 1 2 --iterations 6 --methods euler heun dpm gm regression consistency meanflow"
    quality.main(arguments(source, tmp_path, methods))
    report = json.loads((tmp_path / "quality.json").read_text())
    found = [(row["method"], row["nfe"]) for row in report["rows"]]
    everywhere = ["pi-Flow GM", "direct regression", "consistency", "MeanFlow"]
    expected = [("teacher", 50), ("teacher, Euler", 1), ("teacher, Euler", 2), ("teacher, Heun", 2)]
    expected += [("teacher, DPM-Solver++", 1), ("teacher, DPM-Solver++", 2)]
    assert found == expected + [(name, nfe) for name in everywhere for nfe in (1, 2)]
    rows = {row["method"]: row for row in report["rows"]}
    # Six steps of eight samples, with two calls of the teacher each, are 96 calls: one trajectory and a half.
    assert rows["direct regression"]["pairs"] == 1
    assert rows["pi-Flow GM"]["steps"] == 6 and rows["pi-Flow GM"]["network_runs"] == 2
    assert rows["teacher, Heun"]["network_runs"] == 4  # guided, so each call runs the network twice
    assert rows["MeanFlow"]["training"]["seconds"] > rows["MeanFlow"]["training"]["seconds_before_first_step"]
    assert (tmp_path / "quality.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(expected) + 8

    before = {f: f.read_bytes() for f in tmp_path.glob("**/*.json") if f.name != "quality.json"}
    quality.main(arguments(source, tmp_path, f"{methods} --json"))
    assert {f: f.read_bytes() for f in before} == before
    assert json.loads(capsys.readouterr().out)["rows"] == report["rows"]


def test_a_budget_in_minutes_becomes_steps(source, tmp_path):
    options = arguments(source, tmp_path, "--methods gm regression --nfe 1 --minutes-per-method 0.005")
    benchmark = quality.Benchmark(quality.parse(options))
    plan = benchmark.plan
    gm, regression = plan["gm-nfe1"], plan["regression-nfe1"]
    assert gm["iterations"] == max(int(0.3 / gm["timed"]["step_seconds"]), 1)
    assert regression["iterations"] == max(int(0.15 / regression["timed"]["step_seconds"]), 1)
    assert regression["pairs"] == max(int(0.15 / regression["timed"]["pair_seconds"]), 1)
    benchmark.train_all()
    trained = load_checkpoint(tmp_path / "students" / "gm-nfe1-seed0", kind="student")
    assert trained.iteration == gm["iterations"]
    options[-1] = "0.01"
    with pytest.raises(SystemExit, match="give another --out"):
        quality.Benchmark(quality.parse(options)).plan  # noqa: B018 (a cached property that checks)
