"""Nothing leaves the machine: one place imports onnxruntime, with its telemetry off; no socket, no trace in HOME."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from piflow_edge.doctor.examination import telemetry_finding
from piflow_edge.doctor.findings import OK, WARNING
from piflow_edge.engines.ort import importing as ort_package
from tests.helpers import without_network

ROOT = Path(__file__).parents[2]
ONE_PLACE = ROOT / "engines" / "ort" / "importing.py"
VARIABLE = ort_package.TELEMETRY_VARIABLE
GUARD = Path(without_network.__file__)


def find_sources():
    folders = ("piflow_edge", "engines", "export", "benchmarks", "docs", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def find_imports(tree):
    """Names of modules that a syntax tree imports, late and by their name too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


@pytest.mark.skipif(not ONE_PLACE.is_file(), reason="the sources are not here")
def test_one_place_alone_imports_onnxruntime():
    sources = find_sources()
    assert ONE_PLACE in sources and len(sources) > 100
    found = {
        str(path.relative_to(ROOT))
        for path in sources
        for name in find_imports(ast.parse(path.read_text(encoding="utf-8")))
        if name.partition(".")[0] == "onnxruntime"
    }
    assert found == {"engines/ort/importing.py"}


def test_programs_of_ours_that_load_onnxruntime_themselves_turn_its_telemetry_off():
    """Examples in the documentation and programs that tests run, in Python, JavaScript or C++."""
    fenced = [
        block
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        for block in re.findall(r"```\w+\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    ]
    texts = [
        node.value
        for path in find_sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value
    ]
    loads = re.compile(
        r"^\s*import onnxruntime|(from|require\(|import\() *[\"']onnxruntime-node|Ort::Env", re.M
    )
    programs = [text for text in (*fenced, *texts) if loads.search(text)]
    assert len(programs) >= 2
    assert [text for text in programs if VARIABLE not in text] == []


def run_without(*arguments, folder, path=None, **variables):
    """A Python process in an empty folder with an empty home, where sockets are forbidden."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("XDG_", "PIFLOW_", VARIABLE))
    }
    home, work = folder / "home", folder / "work"
    home.mkdir()
    work.mkdir()
    environment = kept | {"HOME": str(home), "USERPROFILE": str(home), "TMPDIR": str(work)} | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(GUARD), *map(str, arguments)]
    return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)


def test_a_process_that_asks_for_a_socket_is_ended(tmp_path):
    """The guard of the tests below guards: without this they would prove nothing."""
    done = run_without("-c", "import socket; socket.socket(); print('open')", folder=tmp_path)
    assert done.returncode != 0 and "open" not in done.stdout


def test_sampling_opens_no_socket_and_leaves_nothing_in_an_empty_home(tmp_path):
    if not without_network.is_watched_by_kernel():
        print(
            "sockets of native libraries are not watched here; files are, and Python's sockets"
        )  # shown by -rP
    image = tmp_path / "three.png"
    done = run_without(
        "-m", "piflow_edge.cli", "sample", "digits", "--labels", "3", "--out", image, folder=tmp_path
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["home", "three.png", "work"]


# An onnxruntime of a newer release that tells what its process had set when it was imported.
STAND_IN = """
import os, sys
__version__ = "{release}"
class InferenceSession: pass
print("imported with", os.environ.get("ORT_DISABLE_TELEMETRY"))
def disable_telemetry_events(): print("turned off")
def set_default_logger_severity(severity): print("severity", severity) if "severity" in sys.argv else None
"""
LOAD = "from piflow_edge.engines.ort.importing import import_onnxruntime as load; "


@pytest.fixture
def stand_in(tmp_path):
    folder = tmp_path / "packages" / "onnxruntime"
    folder.mkdir(parents=True)

    def write(release):
        (folder / "__init__.py").write_text(STAND_IN.format(release=release))
        return folder.parent

    return write


@pytest.mark.skipif(sys.platform == "win32", reason="there the call is made in any case")
@pytest.mark.parametrize(("wish", "seen"), [({}, "1"), ({VARIABLE: "0"}, "0"), ({VARIABLE: "1"}, "1")])
def test_telemetry_is_off_before_onnxruntime_is_loaded_unless_the_user_said_otherwise(
    tmp_path, stand_in, wish, seen
):
    done = run_without("-c", LOAD + "load(); load()", folder=tmp_path, path=stand_in("1.32.0"), **wish)
    assert (done.stdout, done.stderr) == (f"imported with {seen}\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="there the call is made in any case")
@pytest.mark.parametrize(
    ("release", "wish", "calls", "warned"),
    [
        ("1.29.0", {}, 1, True),
        ("1.28.1", {}, 1, False),  # sends nothing from this system
        ("1.32.0", {VARIABLE: "1"}, 0, False),
        ("1.32.0", {VARIABLE: "0"}, 0, False),
    ],
)
def test_an_onnxruntime_that_was_imported_before_is_turned_off_and_warned_of_once(
    tmp_path, stand_in, release, wish, calls, warned
):
    code = "import onnxruntime; " + LOAD + "load(); load()"
    done = run_without("-c", code, folder=tmp_path, path=stand_in(release), **wish)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("turned off") == calls
    assert done.stderr.count(f"set {VARIABLE}=1 before that import") == warned


@pytest.mark.parametrize(
    ("value", "off"),
    [(None, True), ("1", True), ("Yes", True), ("on", True), ("0", False), ("", False), ("no", False)],
)
def test_doctor_says_the_state(monkeypatch, value, off):
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    (finding,) = telemetry_finding({"onnxruntime": "1.32.0"})
    assert (finding.status, finding.subject) == (OK if off else WARNING, "telemetry")
    assert (finding.fix is None) == off
    assert telemetry_finding({}) == []


# What ONNX Runtime logs.

TALK = (
    LOAD
    + """
import logging, sys
onnxruntime = load()
if "shown" in sys.argv:
    logging.basicConfig(level=logging.DEBUG, format="%(name)s %(levelname)s %(message)s")
import piflow_edge as pf
pf.load(pf.demo_bundle(), engine="ort-cpu")(labels=[3])
onnxruntime.set_default_logger_severity(1)  # a session of somebody else's, which talks
onnxruntime.InferenceSession(pf.demo_bundle() / "student.fp32.onnx")
"""
)


@pytest.mark.parametrize("shown", [False, True])
def test_what_onnxruntime_logs_goes_to_logging_and_not_to_stderr(tmp_path, shown):
    onnxruntime = pytest.importorskip("onnxruntime")
    if not hasattr(onnxruntime, "set_default_logger_callback"):
        pytest.skip("this release takes no callback")
    done = run_without("-c", TALK, "shown" if shown else "", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert any(line.startswith("piflow_edge.onnxruntime DEBUG") for line in lines) == shown
    assert [line for line in lines if not line.startswith(("piflow_edge", "PIL"))] == []


MESSAGES = """
def set_default_logger_callback(callback, severity=2):
    if callback is None:
        return print("callback taken back")
    callback(2, "", "Default", "a.cc:1 f", "No registered plugin EP device found for 'CUDAExecutionProvider'")
    callback(3, "", "Default", "b.cc:2 g", "libcublasLt.so.13: cannot open shared object file")
"""


def test_warnings_and_errors_of_providers_are_kept_for_the_exception(tmp_path, stand_in):
    path = stand_in("1.32.0")
    with open(path / "onnxruntime" / "__init__.py", "a") as file:
        file.write(MESSAGES)
    code = (
        LOAD
        + "load(); load(); from piflow_edge.engines.ort.importing import latest_errors; print(latest_errors())"
    )
    done = run_without("-c", code, folder=tmp_path, path=path)
    assert done.stderr == "" and done.returncode == 0
    told = "imported with 1\nlibcublasLt.so.13: cannot open shared object file\ncallback taken back\n"
    assert done.stdout == told
    loud = "import logging; logging.basicConfig(level=logging.INFO); " + LOAD + "load()"
    (tmp_path / "loud").mkdir()
    done = run_without("-c", loud, folder=tmp_path / "loud", path=path)
    assert "INFO:piflow_edge.onnxruntime:No registered plugin EP device found" in done.stderr


def test_an_onnxruntime_without_callback_prints_no_warnings(tmp_path, stand_in):
    done = run_without("-c", LOAD + "load(); load()", "severity", folder=tmp_path, path=stand_in("1.19.0"))
    assert done.stdout.splitlines()[1:] == ["severity 3"] and done.stderr == ""
