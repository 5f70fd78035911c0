"""What doctor says of NVIDIA's software, on machines made of a few answers: no GPU is needed."""

import shutil
import subprocess

import pytest

from piflow_edge.doctor import nvidia_findings as nvidia
from piflow_edge.doctor.findings import OK, PROBLEM, WARNING
from piflow_edge.system import hardware


@pytest.fixture
def driver(monkeypatch):
    """Sets the CUDA of the driver; None is no driver."""

    def set_to(version):
        monkeypatch.setattr(nvidia, "driver_cuda_version", lambda: version)
        gpu = {"name": "a GPU", "driver_version": "560.35.03"}
        monkeypatch.setattr(nvidia, "nvidia_gpus", lambda: version and [gpu])

    return set_to


def test_software_for_gpus_without_a_driver_is_a_problem(driver, monkeypatch):
    driver(None)
    assert [f.status for f in nvidia.nvidia_findings({"onnxruntime": "1"})] == [OK]
    (finding,) = nvidia.nvidia_findings({"onnxruntime-gpu": "1", "tensorrt": "10"})
    assert finding.status == PROBLEM and finding.fix.startswith("install NVIDIA's driver")
    assert "pip uninstall -y onnxruntime-gpu tensorrt && pip install 'piflow-edge[cpu]'" in finding.fix
    monkeypatch.setattr(nvidia, "nvidia_gpus", lambda: [{"name": "a GPU"}])
    (finding,) = nvidia.nvidia_findings({})
    assert finding.status == PROBLEM and "libcuda does not load" in finding.detail and "--gpus" in finding.fix


def test_everything_is_looked_at_where_there_is_a_driver(driver, monkeypatch):
    driver((12, 6))
    monkeypatch.setattr(nvidia, "onnxruntime_cuda", lambda: "12.8")
    findings = nvidia.nvidia_findings({"onnxruntime-gpu": "1.26.0"})
    assert [f.subject for f in findings] == ["nvidia", "cuda", "cudnn", "tensorrt", "cuda kernel"]
    assert "560.35.03" in findings[0].detail and "12.6" in findings[0].detail


def test_an_onnxruntime_for_a_newer_cuda_than_the_drivers_is_a_problem(monkeypatch):
    monkeypatch.setattr(nvidia.platform, "machine", lambda: "aarch64")
    finding = nvidia.cuda_finding("1.31.1", "13.0", (12, 6))
    assert finding.status == PROBLEM  # nothing older is built for it
    assert finding.fix.startswith("pip uninstall -y onnxruntime-gpu && pip install 'piflow-edge[cpu]'")
    monkeypatch.setattr(nvidia.platform, "machine", lambda: "x86_64")
    finding = nvidia.cuda_finding("1.31.1", "13.0", (12, 6))
    assert finding.status == PROBLEM and "built for CUDA 13.0" in finding.detail
    assert "580" in finding.fix and "onnxruntime-gpu[cuda,cudnn]<1.27" in finding.fix


def test_with_a_driver_that_is_too_old_nothing_is_brought_for_the_newer_cuda(driver, monkeypatch, provider):
    driver((12, 6))
    monkeypatch.setattr(nvidia, "onnxruntime_cuda", lambda: "13.0")
    findings = nvidia.nvidia_findings({"onnxruntime-gpu": "1.31.1"})
    assert [f.subject for f in findings] == ["nvidia", "cuda", "tensorrt", "cuda kernel"]
    assert nvidia.missing_library(provider("cublasLt.so.13"), "1.31.1")[1] == findings[1].fix


@pytest.mark.parametrize(("runtime", "status"), [(None, PROBLEM), ("12.8.90", PROBLEM), ("13.0.96", OK)])
def test_the_cuda_runtime_must_be_of_the_major_version_it_was_built_for(monkeypatch, runtime, status):
    monkeypatch.setattr(nvidia, "cuda_runtime_version", lambda: runtime)
    finding = nvidia.cuda_finding("1.31.1", "13.0", (13, 1))
    assert finding.status == status
    # The same release: otherwise pip would bring another one, perhaps for another CUDA.
    assert status == OK or finding.fix == "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"


@pytest.mark.parametrize(("release", "status"), [(None, PROBLEM), ("8.9.2", PROBLEM), ("9.1.0", OK)])
def test_cudnn_must_be_9(release, status):
    finding = nvidia.cudnn_finding(release, "13.0")
    assert finding.status == status and (
        status == OK or finding.fix == "pip install 'nvidia-cudnn-cu13==9.*'"
    )


def test_tensorrt_for_a_newer_cuda_than_the_drivers_is_a_problem():
    installed = {"tensorrt": "10.15.1", "tensorrt-cu13": "10.15.1"}
    finding = nvidia.tensorrt_finding(installed, (12, 6))
    assert finding.status == PROBLEM and finding.fix.endswith("pip install tensorrt-cu12")


def test_tensorrt_must_load_and_be_a_release_we_know(monkeypatch):
    from types import SimpleNamespace

    for release, status in (("10.3.0", OK), ("7.2.1", PROBLEM)):
        monkeypatch.setattr(nvidia.trt_versions, "tensorrt", lambda r=release: SimpleNamespace(__version__=r))
        assert nvidia.tensorrt_finding({"tensorrt": release}, (12, 6)).status == status

    def broken():
        raise ImportError("it is there") from OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(nvidia.trt_versions, "tensorrt", broken)
    finding = nvidia.tensorrt_finding({"tensorrt": "10.3.0"}, (12, 6))
    assert finding.status == PROBLEM and "libnvinfer.so.10" in finding.detail and "==10.3.0" in finding.fix


def test_a_tensorrt_that_the_environment_does_not_see_is_named(monkeypatch):
    monkeypatch.setattr(nvidia, "tensorrt_library", lambda: "10.3.0")
    finding = nvidia.tensorrt_finding({}, (12, 6))
    assert finding.status == WARNING and "--system-site-packages" in finding.fix


def test_a_compiler_newer_than_the_driver_is_a_problem():
    installed = {"cuda-bindings": "13.0.1", "nvidia-cuda-nvrtc": "13.0.48"}
    finding = nvidia.compiler_finding(installed, (12, 6))
    assert finding.status == PROBLEM and "nvidia-cuda-nvrtc-cu12" in finding.fix
    assert nvidia.compiler_finding(installed, (13, 0)).status == OK
    assert nvidia.compiler_finding({}, (13, 0)).status == WARNING


@pytest.fixture
def provider(tmp_path):
    """Makes a provider's library that needs one that is not there; without a name, one that needs nothing."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")

    def library(name, *arguments):
        command = [compiler, "-shared", "-x", "c", "/dev/null", "-o", str(tmp_path / name), *arguments]
        subprocess.run(command, check=True, capture_output=True)
        return tmp_path / name

    def made(needs=None):
        library("libonnxruntime_providers_shared.so")
        if needs is None:
            return library("libonnxruntime_providers_tensorrt.so")
        other = library(f"lib{needs}", f"-Wl,-soname,lib{needs}")
        path = library("libonnxruntime_providers_cuda.so", "-x", "none", "-Wl,--no-as-needed", str(other))
        other.unlink()
        return path

    return made


@pytest.mark.parametrize(
    ("needs", "cuda", "fix"),
    [
        ("nvinfer.so.10", (13, 0), "pip install 'tensorrt==10.*'"),
        ("cublasLt.so.13", (13, 0), "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'"),
        ("cublasLt.so.13", None, "install NVIDIA's driver"),
        ("cuda.so.1", None, "install NVIDIA's driver"),
    ],
)
def test_the_loader_says_which_library_a_provider_lacks(driver, monkeypatch, provider, needs, cuda, fix):
    driver(cuda)
    monkeypatch.setattr(nvidia, "onnxruntime_cuda", lambda: "13.0")
    reason, command = nvidia.missing_library(provider(needs), "1.31.1")
    assert needs in reason and command == fix
    assert nvidia.missing_library(provider(), "1.31.1") is None


# --- Jetson

NANO = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
MODES = "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """A Jetson made of the files and the program that tell of it."""

    def made(release=NANO, mode="15W", modes=MODES):
        files = {"release": release, "model": "NVIDIA Jetson Orin Nano Developer Kit\0", "modes": modes}
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        program = tmp_path / "nvpmodel"
        program.write_text(f"#!/bin/sh\necho 'NV Power Mode: {mode}'\necho 0\n")
        program.chmod(0o755)
        monkeypatch.setattr(hardware, "_TEGRA", tmp_path / "release")
        monkeypatch.setattr(nvidia, "_MODEL", tmp_path / "model")
        monkeypatch.setattr(nvidia, "_POWER_MODES", tmp_path / "modes")
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        return nvidia.jetson_findings()

    return made


def test_a_jetson_tells_its_jetpack_and_power_mode(jetson):
    board, power = jetson()
    assert board.status == OK
    assert board.detail == "NVIDIA Jetson Orin Nano Developer Kit, JetPack 6 (Jetson Linux 36.4.3)"
    assert power.status == WARNING and "15W" in power.detail
    assert power.fix == "sudo nvpmodel -m 2 && sudo jetson_clocks"
    assert jetson(mode="MAXN_SUPER")[1].status == OK
    assert "/modes" in jetson(modes="")[1].fix  # where to look for the ID


def test_an_old_jetpack_is_named(jetson):
    board, _ = jetson(release="# R35 (release), REVISION: 4.1, GCID: 33958178")
    assert board.status == WARNING and "JetPack 5" in board.detail and "JetPack 6" in board.fix


def test_elsewhere_there_is_no_jetson(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_TEGRA", tmp_path / "none")
    assert nvidia.jetson_findings() == []


@pytest.mark.parametrize(
    ("number", "unit", "release"),
    [(90100, 10000, "9.1.0"), (8902, 1000, "8.9.2"), (100300, 10000, "10.3.0"), (8601, 1000, "8.6.1")],
)
def test_versions_are_read_as_the_libraries_count_them(number, unit, release):
    assert nvidia.parts(number, unit) == release
