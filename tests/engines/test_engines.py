"""Which engine runs, why, and what is said when it cannot; options that reach ONNX Runtime; threads and closing."""

import logging
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import piflow_edge as pf
from piflow_edge import engines
from piflow_edge.doctor import examination as doctor
from piflow_edge.engines import ENGINE_NAMES, ENGINES, EngineOptions, Graph, open_engine, placement
from piflow_edge.engines.ort import cuda_sessions as ort_cuda
from piflow_edge.engines.ort import importing as ort_package
from piflow_edge.engines.ort import sessions as ort
from piflow_edge.errors import EngineError, MissingExtraError, PiFlowError
from piflow_edge.kernels import nvidia
from piflow_edge.system import hardware
from tests.helpers import small_network

IDENTITY = Graph(doctor.identity_model())
X = {"x": np.array([1.5], np.float32)}
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")


class Fake:
    """A backend that is missing something, breaks, or runs, as a test wants it."""

    def __init__(self, graph, device, options):
        if self.breaks:
            raise EngineError(f"{self.name} breaks")
        self.device = device

    @classmethod
    def opener(cls, graph, device, options):
        return cls.lacks or partial(cls, graph, device, options)


def fake(name, *, lacks=None, breaks=False):
    return type(name, (Fake,), {"name": name, "lacks": lacks, "breaks": breaks})


@pytest.fixture(scope="module")
def small_graph():
    pytest.importorskip("onnx", reason="the small network is made with onnx")
    return Graph(small_network.model().SerializeToString())


@pytest.fixture
def backends(monkeypatch):
    """Makes a table of fakes, fastest first."""

    def table(**devices_and_backend):
        monkeypatch.setattr(engines, "ENGINES", {n: ("", d) for n, (d, _) in devices_and_backend.items()})
        monkeypatch.setattr(engines, "_backend", lambda name: devices_and_backend[name][1])

    return table


def test_auto_takes_the_first_that_can_run_and_says_why(backends, caplog):
    backends(
        best=(("cuda",), fake("best", lacks="there is no GPU")),
        good=(("cuda",), fake("good", breaks=True)),
        plain=(("cpu",), fake("plain")),
        slow=(("cpu",), fake("slow")),
    )
    caplog.set_level(logging.INFO)
    engine = open_engine(IDENTITY)
    assert (engine.name, engine.device) == ("plain", "cpu")
    assert engine.choice.passed_over == {"best": "there is no GPU", "good": "good breaks"}
    assert "'plain' on cpu runs: it is the fastest" in caplog.text and "no GPU" in caplog.text
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["engine 'good', which is installed, was passed over: good breaks"]


def test_auto_keeps_to_the_device_that_is_asked_for(backends):
    backends(
        best=(("cuda",), fake("best", lacks="there is no GPU")),
        plain=(("cpu",), fake("plain")),
    )
    assert open_engine(IDENTITY, device="cpu").choice.passed_over == {}
    with pytest.raises(EngineError, match=r"cuda:1:\n  best: there is no GPU$"):
        open_engine(IDENTITY, device="cuda:1")


def test_auto_does_not_hide_a_graph_that_cannot_be_read():
    pytest.importorskip("onnxruntime")
    with pytest.raises(EngineError, match="cannot open"):
        open_engine(Graph(b""))  # whole, as far as it goes, and no network


def test_a_named_engine_never_gives_way(backends):
    backends(good=(("cuda",), fake("good", breaks=True)), plain=(("cpu",), fake("plain")))
    with pytest.raises(EngineError, match="good breaks"):
        open_engine(IDENTITY, engine="good") if "good" in ENGINE_NAMES else fake("good", breaks=True)(0, 0, 0)


@pytest.mark.parametrize(
    "name", ["ort-tensorrt", "tensorrt-rtx", "ort-cuda", "openvino", "coreml", "directml"]
)
def test_a_provider_that_is_not_installed_is_an_error_with_a_command(name, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    backend = engines._backend(name)
    monkeypatch.setattr(backend, "system", None)  # as on the system it is for
    if backend.provider in onnxruntime.get_available_providers():
        pytest.skip(f"{backend.provider} is installed here")
    with pytest.raises(MissingExtraError) as error:
        open_engine(IDENTITY, engine=name)
    assert f"engine {name!r} needs ONNX Runtime's {backend.provider}" in str(error.value)
    assert f"pip uninstall -y onnxruntime && pip install {backend.package}" in str(error.value)
    reason = backend.opener(IDENTITY, "", EngineOptions())
    assert str(error.value).startswith(f"{reason}; ") and "pip" not in reason


@pytest.mark.parametrize(
    ("jetson", "driver", "words"),
    [(None, None, "an NVIDIA driver must come first"), ("# R36", (12, 6), "on Jetson NVIDIA's own build"),
     (None, (12, 6), "")],
)  # fmt: skip
def test_what_to_install_for_a_gpu_fits_the_machine(monkeypatch, jetson, driver, words):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(ort_package, "find_installed_packages", list)
    monkeypatch.setattr(ort_cuda, "jetson_release", lambda: jetson)
    monkeypatch.setattr(nvidia, "driver_cuda_version", lambda: driver)
    with pytest.raises(MissingExtraError) as error:
        open_engine(IDENTITY, engine="ort-cuda")
    told, _, added = str(error.value).partition(" (")
    assert told.endswith("pip install 'onnxruntime-gpu[cuda,cudnn]'")
    assert words in added and bool(words) == bool(added)


def test_auto_passes_over_a_gpus_package_in_silence_where_there_is_no_gpu(monkeypatch, caplog):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort_cuda.OrtCUDA, "_missing", classmethod(lambda cls, ort: None))
    monkeypatch.setattr(nvidia, "driver_cuda_version", lambda: None)
    engine = open_engine(IDENTITY)
    assert engine.choice.passed_over["ort-cuda"] == "needs an NVIDIA driver, and this machine has none"
    assert not caplog.records


@pytest.mark.parametrize(("name", "words"), [("coreml", "needs macOS"), ("directml", "needs Windows")])
def test_a_provider_of_another_system_is_not_to_be_installed(name, words):
    backend = engines._backend(name)
    if sys.platform == backend.system:
        pytest.skip("this is its system")
    with pytest.raises(EngineError, match=words) as error:
        open_engine(IDENTITY, engine=name)
    assert "pip" not in str(error.value)
    assert backend.opener(IDENTITY, "", EngineOptions()) == str(error.value)


def test_two_onnxruntimes_are_named(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort_package, "find_installed_packages", lambda: ["onnxruntime", "onnxruntime-gpu"])
    monkeypatch.setattr(ort_cuda.OrtCUDA, "provider", "NoSuchProvider")
    words = "both installed and overwrite each other; .*pip uninstall -y onnxruntime onnxruntime-gpu && pip install"
    with pytest.raises(MissingExtraError, match=words):
        open_engine(IDENTITY, engine="ort-cuda")


def backend_of(provider):
    """An engine of a provider that is, or passes for, one of this build of ONNX Runtime."""
    members = {"name": "of-the-test", "provider": provider, "package": "none", "_missing": lambda ort: None}
    return type("OfTheTest", (ort.OrtEngine,), members)


def idle_provider():
    """A provider of the real library that takes no node of ours: it calls services of Azure, and nothing else."""
    name = "AzureExecutionProvider"
    if name not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip(f"this build of ONNX Runtime has no {name}")
    return name


def tell_no_assignment(monkeypatch):
    """Make ONNX Runtime as it was before 1.24, which did not tell which provider took which node."""
    session = pytest.importorskip("onnxruntime").InferenceSession
    for kind in session.__mro__:
        if "get_provider_graph_assignment_info" in vars(kind):
            monkeypatch.delattr(kind, "get_provider_graph_assignment_info")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_was_left_out_is_an_error():
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(EngineError, match="left CUDAExecutionProvider out"):
        backend_of("CUDAExecutionProvider")(IDENTITY, "cpu", EngineOptions())


def test_a_provider_that_takes_no_node_is_an_error():
    with pytest.raises(EngineError, match="none of its 1 "):
        backend_of(idle_provider())(IDENTITY, "cpu", EngineOptions())


def test_it_is_seen_in_onnxruntimes_that_do_not_tell_of_it(monkeypatch, tmp_path):
    provider = idle_provider()
    tell_no_assignment(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(EngineError, match="none of its 1 "):
        backend_of(provider)(IDENTITY, "cpu", EngineOptions())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tells", [True, False])
def test_the_nodes_of_a_provider_that_takes_them_are_counted(monkeypatch, small_graph, tells):
    onnxruntime = pytest.importorskip("onnxruntime")
    if not tells:
        tell_no_assignment(monkeypatch)
    settings = onnxruntime.SessionOptions()
    with placement.watch_placement(onnxruntime, settings) as counted:
        session = onnxruntime.InferenceSession(
            small_graph.model, settings, providers=["CPUExecutionProvider"]
        )
        counts = counted(session)
    assert counts["CPUExecutionProvider"] > 3 and sum(counts.values()) == counts["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("nodes", "rest"),
    [
        ([("Ours", "MatMul")] * 4 + [("CPU", "Shape")], None),
        ([("Ours", "MatMul")] * 4 + [("CPU", "Shape")] * 5, "5 of 9 nodes"),
        (
            [("Ours", "MatMul")] * 3 + [("CPU", "Conv"), ("CPU", "Shape")],
            "1 of 4 matrix products and 2 of 5 nodes",
        ),
        ([("Ours", "compiled"), ("CPU", "Shape"), ("CPU", "Gather")], None),  # one node stands for many
        ([("Ours", "compiled"), ("CPU", "Gemm")], "1 of 1 matrix products and 1 of 2 nodes"),
    ],
)
def test_work_that_a_provider_leaves_to_the_cpu_is_described(nodes, rest):
    assert placement.Placement(nodes).describe_rest("Ours") == rest


def test_an_engine_that_leaves_products_to_the_cpu_warns_with_the_share(monkeypatch, small_graph, caplog):
    """On the real library, of whose nodes some pass for another provider's."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} says it in a profile")
    counted = placement._read_placement

    def tell(session):
        whole = counted(session)
        nodes = [("CPUExecutionProvider", "MatMul")] * 2 + [("CPUExecutionProvider", "Add")] * sum(
            whole.values()
        )
        return placement.Placement([*nodes, ("Another", "MatMul")])

    monkeypatch.setattr(placement, "_read_placement", tell)
    monkeypatch.setattr(ort, "_CPU_PROVIDER", "Another")
    backend = backend_of("CPUExecutionProvider")
    with caplog.at_level(logging.WARNING):
        engine = backend(small_graph, "cpu", EngineOptions())
    assert "leaves 1 of 3 matrix products and 1 of" in caplog.text and "piflow-edge bench" in caplog.text
    assert engine.node_counts["Another"] == 1


def test_a_provider_that_fails_prints_nothing_and_is_an_error(capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    backend = type(
        "Broken", (ort.OrtCPU,), {"provider": "CUDAExecutionProvider", "_missing": lambda ort: None}
    )
    with pytest.raises(EngineError):
        backend(IDENTITY, "cpu", EngineOptions())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("engine", "device"),
    [
        ("ort-cpu", "cuda"),
        ("ort-cpu", "cpu:1"),
        ("ort-cuda", "cuda:x"),
        ("ort-cuda", "cuda:"),
        ("auto", "tpu"),
        ("auto", "cuda:x"),
        ("auto", "cpu:1"),
    ],
)
def test_a_device_the_engine_does_not_know_is_refused(engine, device):
    with pytest.raises(EngineError, match=f"{device}'"):
        open_engine(IDENTITY, engine=engine, device=device)


def test_importing_the_table_loads_nothing_that_is_slow_to_import():
    slow = ["numpy", "ctypes", "platform", "shutil", "subprocess", "tempfile", "importlib.metadata"]
    code = f"import sys, piflow_edge.engines; sys.exit(str([m for m in {slow} if m in sys.modules]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == "[]\n"


def test_every_engine_of_the_table_is_there():
    for name in ENGINES:
        backend = engines._backend(name)
        assert backend.name == name and callable(backend.opener)


# --- options


@pytest.mark.parametrize(
    "settings",
    [dict(num_threads=0), dict(num_threads=1.5), dict(num_threads=True), dict(cpu_affinity=()),
     dict(cpu_affinity=(4096,)), dict(cpu_affinity=0), dict(cpu_affinity=(0, "1"))],
)  # fmt: skip
def test_options_out_of_range_are_refused(settings):
    with pytest.raises(EngineError):
        EngineOptions(**settings)


@linux
def test_options_reach_the_session():
    pytest.importorskip("onnxruntime")
    core = min(os.sched_getaffinity(0))
    options = EngineOptions(
        num_threads=2, cpu_affinity=[core], spinning=True, memory_arena=False, memory_pattern=True
    )
    engine = open_engine(IDENTITY, engine="ort-cpu", options=options)
    settings = engine._session.get_session_options()
    assert settings.intra_op_num_threads == options.threads == 2
    assert not settings.enable_cpu_mem_arena and not settings.enable_mem_pattern
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert settings.get_session_config_entry("session.intra_op_thread_affinities") == str(core + 1)
    before = os.sched_getaffinity(0)
    assert engine.run(X)["y"] == X["x"] and os.sched_getaffinity(0) == before


@linux
def test_all_threads_that_compute_keep_to_the_cores(small_graph):
    pytest.importorskip("onnxruntime")
    core = max(os.sched_getaffinity(0))
    before, threads = os.sched_getaffinity(0), set(os.listdir("/proc/self/task"))
    engine = open_engine(
        small_graph, engine="ort-cpu", options=EngineOptions(num_threads=4, cpu_affinity=(core,))
    )
    seen, session = [], engine._session

    def run(names, inputs, options):  # in the calling thread, the fourth that computes
        seen.append(os.sched_getaffinity(0))
        return session.run(names, inputs, options)

    engine._session = SimpleNamespace(run=run)
    given, expected = small_network.inputs(3)
    np.testing.assert_array_equal(engine.run(given)["u"], expected["u"])
    own = [os.sched_getaffinity(int(thread)) for thread in set(os.listdir("/proc/self/task")) - threads]
    assert own == [{core}] * 3 and seen == [{core}]
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"a/cpu.max": "max 100000", "cpu.max": "300000 100000"}, 3),
        ({"a/b/cpu.max": "50000 100000", "cpu.max": "300000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/a/b/cpu.cfs_quota_us": "400000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "garbage"}, 8),
        ({}, 8),
    ],
)
@linux
def test_threads_keep_to_the_quota_of_a_container(monkeypatch, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    told = hardware.read_text
    group = "3:cpu,cpuacct:/a/b\n1:name=systemd:/\n0::/a/b"
    monkeypatch.setattr(
        hardware, "read_text", lambda path: group if str(path) == "/proc/self/cgroup" else told(path)
    )
    hardware._quota.cache_clear()
    try:
        assert hardware.available_cores() == EngineOptions().threads == expected
    finally:
        hardware._quota.cache_clear()


# --- a bundle


@pytest.mark.torch
class TestBundle:
    def test_several_threads_make_what_one_makes(self, shared_bundle):
        with pf.load(shared_bundle, options=pf.EngineOptions(num_threads=1)) as generator:
            alone = [generator([i], seed=i, output="latent").latents for i in range(8)]
            with ThreadPoolExecutor(4) as pool:
                together = pool.map(lambda i: generator([i], seed=i, output="latent").latents, range(8))
            for expected, found in zip(alone, together, strict=True):
                np.testing.assert_array_equal(found, expected)

    def test_a_closed_generator_says_so(self, latent_bundle):
        generator = pf.load(latent_bundle)
        generator([1])
        generator.close()
        generator.close()
        with pytest.raises(PiFlowError, match="is closed"):
            generator([1])
        with pytest.raises(PiFlowError, match="is closed"):
            generator.decode(np.zeros((1, 4, 8, 8), np.float32))

    def test_the_generator_says_why_its_engine_runs(self, shared_bundle):
        assert "fastest" in pf.load(shared_bundle).engine.choice.reason
        assert pf.load(shared_bundle, engine="ort-cpu").engine.choice.reason == "it was asked for"

    def test_the_command_takes_engine_device_threads_and_cores(self, shared_bundle, tmp_path):
        command = [sys.executable, "-m", "piflow_edge.cli", "sample", str(shared_bundle), "--labels", "3"]
        command += [
            "--out",
            str(tmp_path / "3.png"),
            "--engine",
            "ort-cpu",
            "--device",
            "cpu",
            "--threads",
            "1",
        ]
        command += ["--cores", str(min(os.sched_getaffinity(0)))] if hasattr(os, "sched_getaffinity") else []
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.startswith("ort-cpu on cpu"), done.stderr
