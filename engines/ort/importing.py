"""The one place that imports onnxruntime: it sends nothing, and what it logs goes to Python's logging.

From 1.29 on the official packages of ONNX Runtime send usage data (the model's file name, hashes of the graph, the
hardware) to Microsoft from Linux, macOS and Android, and keep an identifier of the device and a database in the user's
cache. Windows packages of every release write such events for the system to send. See Privacy.md in the package.
A test reads the syntax trees of the whole project: nothing else imports onnxruntime.
"""

import atexit
import contextlib
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType

from piflow_edge.errors import MissingExtraError
from piflow_edge.system.hardware import versions

log = logging.getLogger(__name__)
_ort_log = logging.getLogger("piflow_edge.onnxruntime")

# Distributions of ONNX Runtime. Each fills the same folder, so that of two the last one installed wins, half and half.
PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml", "onnxruntime-trt-rtx",
)  # fmt: skip

TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"
# What ONNX Runtime 1.32 takes for yes, in any case; "", "0" and everything else leave its telemetry on.
_YES = ("1", "true", "yes", "on")
_FIRST_THAT_SENDS = (1, 29)  # on other systems than Windows

# Of ONNX Runtime's logger.
_WARNING, _ERROR, _FATAL = 2, 3, 4
# What matters reaches the caller as an exception, whose text `latest_errors` may add to; the rest is for who asks.
_LEVELS = {_WARNING: logging.INFO, _ERROR: logging.INFO, _FATAL: logging.ERROR}
_errors: deque[str] = deque(maxlen=4)


def import_onnxruntime(
    package: str = "'piflow-edge[cpu]'", engine: str = "ort-cpu", also: str = ""
) -> ModuleType:
    """Import onnxruntime with its telemetry off, unless the user has set `ORT_DISABLE_TELEMETRY` to another wish.

    Where somebody else imported onnxruntime before, telemetry is turned off from now on, and a warning is logged once.

    Args:
        package: what pip must install, for the error.
        engine: which engine needs it, for the error.
        also: text added to the error.

    Raises:
        MissingExtraError: it is not installed, or cannot be imported.
    """
    is_first_import = "onnxruntime" not in sys.modules
    was_set = TELEMETRY_VARIABLE in os.environ
    os.environ.setdefault(TELEMETRY_VARIABLE, "1")  # also for processes that this one starts
    try:
        module = import_module("onnxruntime")
        module.InferenceSession  # noqa: B018 - where a package was half removed, an empty folder can be imported
    except Exception as error:  # a broken one raises whatever it stumbles over
        raise MissingExtraError(_explain_missing(error, package, engine) + also) from error
    _route_log(module)
    is_too_late = not (is_first_import or was_set)
    if is_telemetry_off() and (
        is_too_late or sys.platform == "win32"
    ):  # where old packages ignore the variable
        module.disable_telemetry_events()
        if is_too_late and _sends(module.__version__):
            log.warning(
                "onnxruntime %s was imported before piflow-edge, with its telemetry on: it is off from now on, but may "
                "have sent data already; set %s=1 before that import",
                module.__version__,
                TELEMETRY_VARIABLE,
            )
    return module


@cache
def _route_log(module: ModuleType) -> None:
    """Send what ONNX Runtime logs outside of sessions to Python's logging instead of stderr.

    Releases that take no callback print errors only; there is no way to ask for them.
    """
    if not hasattr(module, "set_default_logger_callback"):
        module.set_default_logger_severity(_ERROR)
        return
    module.set_default_logger_callback(_log_message, _WARNING)
    atexit.register(_unroute_log, module)


def _unroute_log(module: ModuleType) -> None:
    """Before the interpreter ends: afterwards nobody can call Python, and the library still says good-bye."""
    module.set_default_logger_severity(_FATAL)
    module.set_default_logger_callback(None)


def _log_message(severity: int, category: str, session: str, place: str, message: str) -> None:
    _ort_log.log(_LEVELS.get(severity, logging.DEBUG), "%s (%s)", message.strip(), place)
    if severity >= _ERROR:
        _errors.append(message.strip())


def latest_errors() -> str:
    """Return the last errors that ONNX Runtime logged, or where they went; for the text of an exception."""
    return "; ".join(_errors) or "nothing here, but on stderr or in the log 'piflow_edge.onnxruntime'"


@contextlib.contextmanager
def silence(module: ModuleType) -> Iterator[None]:
    """Let ONNX Runtime log nothing for a while, for who tries what may fail and reports it himself."""
    module.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        module.set_default_logger_severity(
            _WARNING if hasattr(module, "set_default_logger_callback") else _ERROR
        )


def import_part(name: str) -> ModuleType:
    """Import `onnxruntime.NAME`, such as "quantization", as `import_onnxruntime` does.

    Raises:
        MissingExtraError: onnxruntime is not installed, or cannot be imported.
        ImportError: this onnxruntime has no such part, or that part needs another package.
    """
    import_onnxruntime()
    return import_module(f"onnxruntime.{name}")


def find_installed_packages() -> list[str]:
    """Return which of ONNX Runtime's `PACKAGES` are installed."""
    return list(versions(PACKAGES))


def is_telemetry_off() -> bool:
    """Return False if the user has set `ORT_DISABLE_TELEMETRY` to a value that leaves ONNX Runtime's telemetry on."""
    return os.environ.get(TELEMETRY_VARIABLE, "1").strip().lower() in _YES


def _sends(release: str) -> bool:
    """Return True if the official packages of this release send usage data from this system."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    return sys.platform == "win32" or numbers >= _FIRST_THAT_SENDS


def _explain_missing(error: Exception, package: str, engine: str) -> str:
    names = find_installed_packages()
    reason = f", and what is here does not load ({error})" if names else ""
    command = f"pip install {package}"
    if names:  # else pip finds it installed, and does nothing
        command = f"pip uninstall -y {' '.join(names)} && {command}"
    return f"engine {engine!r} needs onnxruntime{reason}; get it with: {command}"
