"""What bench measures, how it tells of it, and what counts as having moved. No figure is judged: machines differ."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from piflow_edge.bench.comparison_of_runs import PROCESS_NOISE, compare, process_noise, read_benchmark
from piflow_edge.conditioning import ClassLabels, ConditionRequest, Unconditional
from piflow_edge.errors import DataError, PiFlowError, ScheduleError
from piflow_edge.runtime.teacher_engine import EngineTeacher
from piflow_edge.schedule import warp
from piflow_edge.system.hardware import machine, memory
from tests.commands import command_line
from tests.conftest import HAS_TORCH

needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="students are made with the 'train' extra")


class Line:
    """An engine whose network knows one answer, x_0 = its label, with which u_t = (x_t - x_0) / sigma_t."""

    def __init__(self):
        self.batches = []

    def run(self, inputs):
        self.batches.append(len(inputs["x_t"]))
        per_sample = (-1, 1, 1, 1)
        x_0 = inputs["labels"].reshape(per_sample).astype(np.float32)
        return {"u_t": (inputs["x_t"] - x_0) / inputs["t"].reshape(per_sample)}


def test_a_teacher_that_no_engine_has_built_is_an_error(monkeypatch, tmp_path):
    from piflow_edge import demo_bundle
    from piflow_edge.bench import benchmark as bench
    from piflow_edge.errors import EngineError, EngineNotBuiltError

    def not_built(*settings):
        raise EngineNotBuiltError("there is no engine of the teacher")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(bench, "line_up_teacher", not_built)
    (tmp_path / "t.onnx").touch()
    with pytest.raises(EngineError, match="runs the teacher"):
        bench.bench(
            [demo_bundle()], bench.BenchConfig(cold_starts=0), bench.TeacherConfig(tmp_path / "t.onnx")
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(engines=[]), r"engines .*"),
        (dict(engines="ort-cpu"), r"engines .*'ort-cpu'"),
        (dict(engines=["all", "warp-drive"]), "engine is one of all, auto, .* got 'warp-drive'"),
        (dict(batches=1), r"batches .*1"),
        (dict(batches=[1, 0]), r"each of batches .*0"),
        (dict(rounds=0), r"rounds .*0"),
        (dict(cold_starts=-1), r"cold_starts .*-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    from piflow_edge.bench.config import BenchConfig

    with pytest.raises(PiFlowError, match=words):
        BenchConfig(**settings)


def test_a_teacher_without_a_graph_or_steps_is_refused_and_so_is_no_bundle(tmp_path):
    from piflow_edge.bench import benchmark as bench
    from piflow_edge.errors import EngineError

    with pytest.raises(EngineError, match=r"nowhere\.onnx"):
        bench.TeacherConfig(tmp_path / "nowhere.onnx")
    (tmp_path / "t.onnx").touch()
    with pytest.raises(ScheduleError, match="steps"):
        bench.TeacherConfig(tmp_path / "t.onnx", steps=0)
    with pytest.raises(PiFlowError, match="bundle"):
        bench.bench([])


def test_what_is_named_twice_is_measured_once():
    from piflow_edge import demo_bundle
    from piflow_edge.bench import benchmark as bench

    pytest.importorskip("onnxruntime")
    config = bench.BenchConfig(
        engines=["auto", "ort-cpu"], nfes=[1, 1], rounds=1, warmup=0, cold_starts=0, device="cpu"
    )
    assert len(bench.bench([demo_bundle()], config).rows) == 1


DIGITS = ClassLabels(tuple("0123456789"))


class TestTeacher:
    noise = np.random.default_rng(0).standard_normal((2, 1, 2, 2), np.float32)
    given = DIGITS.encode(ConditionRequest(labels=[4, 6]))

    def test_guidance_is_one_call_of_two_samples_per_image(self):
        engine = Line()
        made = EngineTeacher(engine, DIGITS).sample(self.noise, self.given, 5, guidance_scale=1.5, shift=3.0)
        assert engine.batches == [4] * 5
        # Away from the null class's 10, by half as much again as the class is.
        assert np.allclose(made[0], 4 + 0.5 * (4 - 10), atol=1e-4)
        assert np.allclose(made[1], 6 + 0.5 * (6 - 10), atol=1e-4)

    def test_without_guidance_a_call_is_of_one_sample(self):
        engine = Line()
        made = EngineTeacher(engine, DIGITS).sample(self.noise, self.given, 3)
        assert engine.batches == [2] * 3 and np.allclose(made[1], 6, atol=1e-4)

    @pytest.mark.parametrize(
        ("scale", "conditioner", "words"),
        [(0.5, DIGITS, "1 .none. or more"), (2.0, Unconditional(), "no condition")],
    )
    def test_guidance_that_makes_no_sense_is_refused(self, scale, conditioner, words):
        with pytest.raises(ScheduleError, match=words):
            EngineTeacher(Line(), conditioner).check_guidance(scale)

    @needs_torch
    def test_it_is_the_guided_teacher_of_the_training(self):
        import torch

        from piflow_edge.distill.teacher import GuidanceConfig, GuidedTeacher

        class Network:
            def velocity(self, x_t, sigma_t, labels):
                inputs = {"x_t": x_t.numpy(), "t": sigma_t.numpy(), "labels": labels.numpy()}
                return torch.from_numpy(Line().run(inputs)["u_t"])

        labels = np.array([4, 6])
        expected = GuidedTeacher(Network(), GuidanceConfig(1.5), null={"labels": torch.tensor(10)}).sample(
            torch.from_numpy(self.noise), 7, shift=2.0, labels=torch.from_numpy(labels)
        )
        teacher = EngineTeacher(Line(), DIGITS)
        found = teacher.sample(self.noise, self.given, 7, guidance_scale=1.5, shift=2.0)
        assert np.allclose(found, expected.numpy(), atol=1e-5)
        assert warp(0.5, 2.0) != 0.5  # the shift matters in this comparison


def test_what_was_left_out_is_one_line_for_each_reason():
    from piflow_edge.bench.rows import Benchmark
    from piflow_edge.bench.tables import conditions_text

    there = {"load": 0.5, "power": {}}
    conditions = {
        "cpu": "a processor", "cores": 2, "system": "Linux", "versions": {}, "before": there, "after": there,
        "rounds": 3, "warmup": 1, "timed": "calls", "cold_starts": 0, "teacher": None,
    }  # fmt: skip
    left_out = [
        {"model": model, "engine": engine, "precision": precision, "why": why}
        for model in ("gm", "dx")
        for engine, why in (("ort-cuda", "no GPU"), ("tensorrt", "no GPU"), ("coreml", "not a Mac"))
        for precision in ("fp32", "int8")
    ]
    lines = conditions_text(Benchmark([], [], conditions, left_out)).splitlines()
    assert [line for line in lines if line.startswith("left out")] == [
        "left out: gm, dx in ort-cuda, tensorrt, fp32, int8: no GPU",
        "left out: gm, dx in coreml, fp32, int8: not a Mac",
    ]


def test_names_may_hold_commas(tmp_path):
    from piflow_edge.bench.quality_plot import read_quality

    names = ["a, b", "c", "a, b, 2 calls", "c, 1 call", "teacher, 1 step", "d, 3 calls more"]
    scores = [{"name": name, "network_calls": i, "fid": 1} for i, name in enumerate(names)]
    (tmp_path / "e.json").write_text(json.dumps({"scores": scores}))
    found = [name for name, _ in read_quality(tmp_path / "e.json")]
    assert found == ["a, b", "c", "a, b", "c", "teacher", "d, 3 calls more"]


def test_the_machine_says_what_it_is():
    told = machine()
    assert told["cpu"] and told["cores"] >= 1 and "numpy" in told["versions"]
    used = memory()
    if used is None:
        pytest.skip("this system does not tell a process's memory")
    block = np.ones(5_000_000)  # 40 MB
    grown = memory()
    assert 30 < grown.resident - used.resident < 50 and grown.peak >= grown.resident
    del block


def run(median, *, noise=0.02, count=60, seed=0, key="a", cpu="x"):
    """A run of one setting, as JSON."""
    random = np.random.default_rng(seed)
    rounds = (median * (1 + noise * random.standard_normal(count))).tolist()
    pulse = (1 + noise * random.standard_normal(count)).tolist()
    conditions = {
        "cpu": cpu,
        "versions": {"numpy": "2"},
        "before": {"load": [seed], "power": {"cpu_mhz": [seed]}},
    }
    return {
        "format": 1,
        "conditions": conditions,
        "rows": [{"key": key, "rounds": rounds}],
        "machine_rounds": pulse,
    }


class TestCompare:
    def test_noise_is_no_change(self):
        for seed in range(1, 8):
            found = compare(run(10.0), run(10.0, seed=seed))
            assert found.changes[0].verdict == "within noise" and found.machine.verdict == "within noise"
            assert found.differs == []

    @pytest.mark.parametrize(("now", "verdict"), [(14.0, "slower"), (7.0, "faster")])
    def test_what_moved_is_found(self, now, verdict):
        change = compare(run(10.0), run(now, seed=1)).changes[0]
        assert change.verdict == verdict and change.low < change.ratio < change.high
        assert change.ratio == pytest.approx(now / 10, rel=0.02)

    def test_less_than_two_processes_differ_is_no_change(self):
        change = compare(
            run(10.0, noise=1e-4), run(10 * (1 + PROCESS_NOISE / 2), noise=1e-4, seed=1)
        ).changes[0]
        assert change.low > 1 and change.verdict == "within noise"

    def test_fresh_processes_say_how_far_processes_differ(self):
        def with_processes(run, seed, spread=0.05):
            row = run["rows"][0]
            return run | {"rows": [row | {"processes": with_spread(seed, spread, 3)}]}

        def with_spread(seed, spread, count):
            return np.exp(spread * np.random.default_rng(seed).standard_normal(count)).tolist()

        old, new = run(10.0, noise=1e-4), run(11.0, noise=1e-4, seed=1)
        assert compare(old, new).process_noise == PROCESS_NOISE and not compare(old, new).measured
        found = compare(with_processes(old, 0), with_processes(new, 1))
        assert found.measured and found.process_noise > 0.1 and found.changes[0].verdict == "within noise"
        quiet = compare(with_processes(old, 0, 1e-3), with_processes(new, 1, 1e-3))
        assert quiet.process_noise < 0.02 and quiet.changes[0].verdict == "slower"
        # Of many pairs of processes with one spread, 1 in 100 is further apart.
        rows = [{"processes": with_spread(seed, 0.05, 3)} for seed in range(200)]
        apart = [np.log(a / b) for a, b, _ in (row["processes"] for row in rows)]
        assert 0.97 < np.mean(np.abs(apart) < np.log1p(process_noise(rows))) <= 1
        assert process_noise(rows[:1]) is None

    def test_a_wide_interval_is_no_change(self):
        assert compare(run(10.0, noise=0.8, count=9), run(11.0, noise=0.8, count=9, seed=1)).changes[
            0
        ].verdict == ("within noise")

    def test_what_was_not_alike_is_told(self):
        found = compare(run(10.0, cpu="x"), run(10.0, cpu="y", key="b"))
        assert found.differs == [("cpu", "x", "y")]
        assert found.only_old == ["a"] and found.only_new == ["b"] and not found.changes

    @pytest.mark.parametrize(
        "change",
        [
            {"format": 99}, {"conditions": []}, {"rows": {}}, {"rows": [{}]}, {"rows": [{"key": "a", "rounds": []}]},
            {"rows": [{"key": "a", "rounds": ["1"]}]}, {"machine_rounds": [float("nan")]}, {"machine_rounds": None},
            {"rows": [{"key": "a", "rounds": [1.0], "processes": None}]},
        ],
    )  # fmt: skip
    def test_another_file_is_refused(self, change, tmp_path):
        file = tmp_path / "old.json"
        file.write_text(json.dumps(run(10.0)))
        assert compare(read_benchmark(file), run(10.0)).changes
        file.write_text(json.dumps(run(10.0) | change))
        with pytest.raises(DataError, match=r"old\.json"):
            read_benchmark(file)

    @pytest.mark.parametrize("text", ["", "[]", "{"])
    def test_no_json_of_a_run_is_refused(self, text, tmp_path):
        file = tmp_path / "old.json"
        file.write_text(text)
        with pytest.raises(DataError, match=r"old\.json"):
            read_benchmark(file)


def bench(*arguments, code=0):
    return command_line.run("bench", *arguments, code=code)


def size_of(file):
    with Image.open(file) as image:
        return image.size


@needs_torch
class TestCommand:
    quick = ("--rounds", 2, "--warmup", 1, "--cold-starts", 0)

    def test_every_setting_is_measured_and_compared(self, shared_bundle, tmp_path):
        from piflow_edge.distill.networks.dit import DiTConfig
        from piflow_edge.distill.networks.flow_network import DiTNetwork
        from piflow_edge.export.onnx_graphs.teacher_graph import export_teacher

        teacher = tmp_path / "teacher.onnx"
        assert export_teacher(DiTNetwork(DiTConfig(hidden_size=16, depth=1, num_heads=2)), teacher) < 1e-4
        quality = {"scores": [
            {"name": "tiny", "network_calls": 2, "fid": 9.0},
            {"name": "teacher, 3 steps", "network_calls": 3, "fid": 7.0},
        ]}  # fmt: skip
        (tmp_path / "evaluation.json").write_text(json.dumps(quality))
        grid = ("--nfe", "1,2", "--batch", "1,3", "--teacher", teacher, "--teacher-steps", 3)
        files = (
            "--csv",
            tmp_path / "b.csv",
            "--plot",
            tmp_path / "b.png",
            "--evaluation",
            tmp_path / "evaluation.json",
        )
        old = json.loads(bench(shared_bundle, *grid, *files, *self.quick, "--json").stdout)
        assert [(r["calls"], r["substeps"], r["batch"]) for r in old["rows"]] == [
            (1, 128, 1), (1, 128, 3), (2, 128, 1), (2, 128, 3), (3, None, 1), (3, None, 3),
        ]  # fmt: skip
        for row in old["rows"]:
            assert len(row["rounds"]) == 2 and len(row["warmup"]) == 1
            assert 0 < row["split"]["network"] < row["median"] <= row["p99"]
        assert [row["trained"] for row in old["rows"][:3]] == [False, False, True]
        assert old["conditions"]["teacher"]["guidance_scale"] == 1.5
        rows = list(csv.DictReader(io.StringIO((tmp_path / "b.csv").read_text())))
        assert len(rows) == 6 and float(rows[0]["median"]) == old["rows"][0]["median"]
        assert size_of(tmp_path / "b.png") == (900, 540)

        (tmp_path / "old.json").write_text(json.dumps(old))
        done = bench(
            shared_bundle, *self.quick, "--compare", tmp_path / "old.json", "--plot", tmp_path / "c.png"
        )
        assert "new / old" in done.stdout and "tiny" in done.stdout
        assert (
            "not alike: teacher" in done.stderr
            and "only in the old run: tiny, ort-cpu, fp32, 1 call" in done.stderr
        )
        assert size_of(tmp_path / "c.png")[0] == 1200

    def test_a_fresh_process_tells_time_and_memory(self, shared_bundle):
        answer = json.loads(bench(shared_bundle, "--rounds", 1, "--cold-starts", 1, "--json").stdout)
        cold = answer["rows"][0]["cold"]
        assert answer["rows"][0]["processes"] == [cold["warm"]] and cold["warm"] > 0
        assert cold["first_images"] > cold["open"] > 0 and cold["device_memory"] is None
        assert cold["resident"] is None or 20 < cold["resident"] <= cold["peak"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ("--plot x.pdf", "ends in .png"),
            ("--plot no/such/x.png", "no folder no/such"),
            ("--csv no/such/x.csv", "no folder no/such"),
            ("--csv x.png --plot x.png", "two names"),
            ("--evaluation e.json", "--plot"),
            ("--engine steam", "engine is one of"),
            ("--engine all,steam", "got 'steam'"),
            ("--engine ort-cpu,", "got ''"),
            ("--precision fp8", "holds fp32"),
            ("--nfe 0", "1 or more"),
            ("--batch 1,", "1 or more"),
            ("--seconds nan", "give a number"),
            ("--threads 100000", "1<=x<=1024"),
            ("--device steam", "got device 'steam'"),
            ("--teacher none.onnx", "does not exist"),
            ("--guidance 2", "--teacher"),
            ("--teacher-steps 50", "--teacher"),
            ("--compare none.json", "none.json cannot be read"),
        ],
    )
    def test_what_cannot_be_used_is_refused_before_it_is_measured(
        self, arguments, words, shared_bundle, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        done = bench(shared_bundle, *arguments.split(), code=2)
        assert words in done.stderr and "timing" not in done.stderr and not done.stdout
        assert not list(tmp_path.iterdir())

    def test_what_is_not_a_teacher_is_refused(self, shared_bundle, tmp_path):
        (tmp_path / "text.onnx").write_text("text")
        assert (
            "not a whole ONNX model"
            in bench(shared_bundle, "--teacher", tmp_path / "text.onnx", code=2).stderr
        )
        student = shared_bundle / "student.fp32.onnx"
        assert "--teacher-graph" in bench(shared_bundle, "--teacher", student, code=2).stderr
        infinite = bench(shared_bundle, "--teacher", student, "--guidance", "inf", code=2)
        assert "give a number" in infinite.stderr

    def test_bundles_of_one_name_are_refused(self, shared_bundle):
        assert "told apart" in bench(shared_bundle, shared_bundle, code=2).stderr

    @pytest.mark.parametrize("name", ["tiny, b", "other"])
    def test_an_evaluation_of_others_is_refused(self, name, shared_bundle, tmp_path):
        file, plot = tmp_path / "evaluation.json", tmp_path / "b.png"
        file.write_text(json.dumps({"scores": [{"name": name, "network_calls": 2, "fid": 9.0}]}))
        done = bench(shared_bundle, *self.quick, "--evaluation", file, "--plot", plot, code=2)
        assert f"scores {name}, none of which" in done.stderr and "timing" not in done.stderr

    def test_a_full_disk_takes_nothing_of_what_was_measured(self, shared_bundle, tmp_path, monkeypatch):
        from piflow_edge.system import files

        def full(path, data):
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(files, "write_atomic", full)
        done = bench(shared_bundle, *self.quick, "--csv", tmp_path / "b.csv", "--json", code=2)
        assert len(json.loads(done.stdout)["rows"]) == 1 and "No space" in done.stderr

    def test_a_teacher_is_exported(self, tmp_path):
        from piflow_edge.commands.demo import shipped_teacher

        file = tmp_path / "teacher.onnx"
        export = ["export", shipped_teacher(), "--teacher-graph", "--out", file, "--json"]
        done = command_line.run(*export)
        assert json.loads(done.stdout)["error"] < 1e-4 and file.stat().st_size > 100_000
        assert "exists" in command_line.run(*export, code=2).stderr
        refused = command_line.run(*export, "--precision", "fp16", code=2)
        assert "--precision is for a student's bundle" in refused.stderr
