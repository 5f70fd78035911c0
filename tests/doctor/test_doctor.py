"""The doctor: what it finds on a healthy machine, and what it says of each illness."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from piflow_edge import demo_bundle
from piflow_edge.doctor import examination as doctor
from piflow_edge.doctor import package_findings
from piflow_edge.doctor.findings import OK, PROBLEM, WARNING
from piflow_edge.engines.ort import importing as ort_package
from piflow_edge.kernels import cpu
from tests.commands.command_line import run


def test_this_machine_is_well_and_torch_stays_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PIFLOW_EDGE_CACHE", str(tmp_path / "not" / "yet"))
    pytest.importorskip("onnxruntime")
    answer = json.loads(run("doctor", "--json").stdout)
    found = {finding["subject"]: finding for finding in answer["findings"]}
    assert answer["healthy"] and found["cache"]["detail"].startswith(str(tmp_path))
    assert found["CPUExecutionProvider"]["status"] == found["self-test"]["status"] == OK
    assert list(tmp_path.iterdir()) == []
    code = "import sys; from piflow_edge.doctor import examination as e; e.diagnose(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_both_runtimes_are_a_problem_and_so_is_none(monkeypatch):
    both = {"onnxruntime": "1.22.0", "onnxruntime-gpu": "1.21.0"}
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: None)
    finding = doctor.runtime_finding(both)
    assert finding.status == PROBLEM and "1.21.0" in finding.detail
    assert finding.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu") and "[cpu]" in finding.fix
    monkeypatch.setattr(doctor, "nvidia_gpus", lambda: [{"name": "a GPU"}])
    assert "[cuda]" in doctor.runtime_finding(both).fix
    assert doctor.runtime_finding({}).fix == "pip install 'piflow-edge[cpu]'"
    assert doctor.runtime_finding({"onnxruntime": "1.22.0"}).status == OK


@pytest.mark.parametrize(
    ("running", "status"), [((3, 9, 1), PROBLEM), ((3, 10, 0), OK), ((3, 14, 0), WARNING)]
)
def test_python_is_judged_by_its_version(running, status):
    finding = package_findings.python_finding(running)
    assert finding.status == status and (finding.fix is None) == (status == OK)


def test_without_tokenizers_the_command_that_gets_them_is_told(monkeypatch):
    missing = package_findings.prompts_finding({})
    assert missing.status == WARNING and missing.fix == "pip install 'piflow-edge[text]'"
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as one that does not load
    broken = package_findings.prompts_finding({"tokenizers": "0.23.3"})
    assert broken.status == PROBLEM and broken.fix == "pip install --force-reinstall tokenizers"


def test_the_handwritten_model_is_valid_and_the_identity():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(doctor.identity_model())
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Identity"]
    assert model.SerializeToString() == doctor.identity_model()


def test_a_provider_whose_libraries_are_missing_does_not_pass_for_the_cpu():
    onnxruntime = pytest.importorskip("onnxruntime")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not of this build, which is the point
        finding = doctor._provider_finding(onnxruntime, "CUDAExecutionProvider")
    if finding.status == OK:
        pytest.skip("CUDA works here")
    assert finding.status == WARNING and finding.fix.startswith("pip install")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "with SIGILL"),
        ("raise OSError('no libm here')", "no libm here"),
        ("", "module 'onnxruntime' has no attribute"),  # half of it was removed
    ],
)
def test_an_onnxruntime_that_does_not_load_is_told_and_the_rest_too(tmp_path, monkeypatch, content, reason):
    """In a process of its own: this one may have imported the real one."""
    folder = tmp_path / "onnxruntime"
    folder.mkdir()
    (folder / "__init__.py").write_text(content)
    (tmp_path / "onnxruntime-1.22.0.dist-info").mkdir()
    (tmp_path / "onnxruntime-1.22.0.dist-info" / "METADATA").write_text(
        "Name: onnxruntime\nVersion: 1.22.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    answer = subprocess.run(
        [sys.executable, "-m", "piflow_edge.cli", "doctor", "--json"], capture_output=True, text=True
    )
    assert answer.returncode == 1, answer.stderr
    found = {f["subject"]: f for f in json.loads(answer.stdout)["findings"]}
    assert found["providers"]["status"] == PROBLEM and reason in found["providers"]["detail"]
    assert found["providers"]["fix"] == "pip install --force-reinstall onnxruntime"
    assert found["self-test"]["status"] == OK and found["self-test"]["detail"].endswith("on reference")


def test_a_provider_that_leaves_its_network_to_the_cpu_is_not_said_to_run_it():
    onnxruntime = pytest.importorskip("onnxruntime")
    finding = doctor._provider_finding(onnxruntime, "CPUExecutionProvider")
    assert (finding.status, finding.detail) == (OK, "opens and runs a network")
    idle = "AzureExecutionProvider"  # calls services of Azure, and computes nothing itself
    if idle not in onnxruntime.get_available_providers():
        pytest.skip(f"this build of ONNX Runtime has no {idle}")
    finding = doctor._provider_finding(onnxruntime, idle)
    assert (finding.status, finding.detail.split(",")[0]) == (OK, "loads")


@pytest.mark.parametrize(("module", "package"), [("numpy", "numpy"), ("rich", "rich"), ("PIL", "pillow")])
def test_a_package_that_nothing_works_without_is_told_before_the_rest(tmp_path, monkeypatch, module, package):
    (tmp_path / f"{module}.py").write_text("raise ImportError('it is for another processor')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = [sys.executable, "-m", "piflow_edge.cli", "doctor"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1 and f": pip install --force-reinstall {package}\n" in answer.stdout
    answer = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert answer.returncode == 1, answer.stderr
    _, finding = json.loads(answer.stdout)["findings"]
    assert finding["status"] == PROBLEM and "it is for another processor" in finding["detail"]
    assert finding["fix"] == f"pip install --force-reinstall {package}"


def test_without_compiled_kernels_it_warns_with_the_command(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    finding = doctor.kernel_finding()
    assert finding.status == WARNING and "pip install --force-reinstall" in finding.fix
    assert doctor.rollout_finding().status == OK  # NumPy computes the same


def test_a_kernel_that_computes_something_else_is_a_problem(monkeypatch):
    exact = doctor.integrate

    def broken(policy, x_src, sigmas, *, kernel):
        return exact(policy, x_src, sigmas, kernel=kernel) + (0.001 if kernel == "auto" else 0)

    monkeypatch.setattr(doctor, "integrate", broken)
    assert doctor.rollout_finding().status == PROBLEM
    monkeypatch.setattr(doctor, "integrate", lambda *a, **k: np.array(np.nan))
    assert doctor.rollout_finding().status == PROBLEM


def test_packages_are_held_to_what_piflow_edge_asks_for(monkeypatch):
    asked = [
        "numpy>=1.26",
        "click>=8.1",
        "rich>=13",
        "torch<=2.13.0,>=2.9; extra == 'train'",
        "onnx>=1.17; extra == 'train'",
        "starlette>=0.40; extra == 'serve'",
        "starlette>=1.10; extra == 'test'",  # of developers, who learn it from their tests
    ]
    here = {"numpy": "1.9.5", "click": "8.10.0", "torch": "2.14.0+cpu", "starlette": "1.7.0"}
    monkeypatch.setattr(package_findings, "requires", lambda name: asked)
    monkeypatch.setattr(package_findings, "versions", lambda names: {n: here[n] for n in names if n in here})
    listed, *others = package_findings.package_findings({"numpy": "1.9.5"})
    assert listed.status == OK and listed.detail == "numpy 1.9.5"
    assert [(f.status, f.detail.split()[0], f.fix) for f in others] == [
        (PROBLEM, "numpy", "pip install 'numpy>=1.26'"),
        (PROBLEM, "rich", "pip install 'rich>=13'"),
        (WARNING, "torch", "pip install 'torch<=2.13.0,>=2.9'"),
    ]


def test_a_source_tree_that_was_not_installed_is_a_problem(monkeypatch):
    def missing(name):
        raise package_findings.PackageNotFoundError(name)

    monkeypatch.setattr(package_findings, "requires", missing)
    (finding,) = package_findings.package_findings({})
    assert finding.status == PROBLEM and finding.fix == "pip install -e '.[cpu]'"


@pytest.mark.parametrize(
    ("governor", "driver", "preference", "status"),
    [
        ("powersave", "acpi-cpufreq", None, WARNING),
        ("powersave", "intel_pstate", "balance_performance", OK),  # there it is the usual one
        ("powersave", "amd-pstate-epp", "power", WARNING),
        ("performance", "acpi-cpufreq", None, OK),
        (None, None, None, OK),
    ],
)
def test_a_governor_that_saves_power_is_named(tmp_path, monkeypatch, governor, driver, preference, status):
    from piflow_edge.system import hardware

    cpufreq = tmp_path / "cpu0" / "cpufreq"
    cpufreq.mkdir(parents=True)
    files = {
        "scaling_governor": governor,
        "scaling_driver": driver,
        "energy_performance_preference": preference,
    }
    for name, content in files.items():
        if content is not None:
            (cpufreq / name).write_text(content + "\n")
    monkeypatch.setattr(hardware, "_CPU", tmp_path)
    monkeypatch.setattr(doctor, "_CPUFREQ", cpufreq)
    monkeypatch.setattr(doctor, "jetson_release", lambda: None)
    (finding,) = doctor.power_findings()
    assert finding.status == status and (finding.fix is None) == (status == OK)
    assert governor is None or governor in finding.detail


def test_a_cache_that_cannot_be_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    finding = doctor.cache_finding(tmp_path / "file" / "cache")
    assert finding.status == PROBLEM and "PIFLOW_EDGE_CACHE" in finding.fix


def test_an_engine_that_is_missing_is_no_fault_of_the_bundle():
    finding = doctor.bundle_finding(
        demo_bundle(), engine="coreml" if sys.platform != "darwin" else "directml"
    )
    assert finding.status == PROBLEM and finding.fix == "use another --engine or --device"
    pytest.importorskip("onnxruntime")
    if "onnxruntime-openvino" not in ort_package.find_installed_packages():
        finding = doctor.bundle_finding(demo_bundle(), engine="openvino")
        assert finding.fix.endswith("pip install onnxruntime-openvino")


@pytest.mark.torch
def test_a_bundle_is_verified(shared_bundle, bundle):
    assert doctor.bundle_finding(shared_bundle).status == OK
    (bundle / "LICENSE").unlink()
    answer = json.loads(run("doctor", "--bundle", bundle, "--json", code=1).stdout)
    (finding,) = (f for f in answer["findings"] if f["subject"] == "self-test")
    assert not answer["healthy"] and "LICENSE is missing" in finding["detail"]
    assert finding["fix"] == "copy the bundle again, or export it again"
