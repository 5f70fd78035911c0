"""Few-step flow-matching generators: distil with pi-Flow, export, and run without PyTorch.

Names load on first use, so that `import piflow_edge` and `piflow-edge --help` cost next to nothing and
never bring in torch, onnx, onnxruntime or tensorrt.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that holds it. The same list, for type checkers, stands below.
_HOMES = {
    "warp": "schedule",
    "unwarp": "schedule",
    "Schedule": "schedule",
    "Segment": "schedule",
    "GMPolicy": "policies",
    "DXPolicy": "policies",
    "rollout": "integrator",
    "philox_normal": "noise",
    "load": "loading",
    "demo_bundle": "bundle",
    "Generator": "generator",
    "Result": "generator",
    "Progress": "sampling",
    "Recipe": "recipe",
    "read_recipe": "recipe",
    "Cancelled": "errors",
    "EngineOptions": "engines",
    "PiFlowError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .bundle import demo_bundle as demo_bundle
    from .engines import EngineOptions as EngineOptions
    from .errors import Cancelled as Cancelled
    from .errors import PiFlowError as PiFlowError
    from .generator import Generator as Generator
    from .generator import Result as Result
    from .integrator import rollout as rollout
    from .loading import load as load
    from .noise import philox_normal as philox_normal
    from .policies import DXPolicy as DXPolicy
    from .policies import GMPolicy as GMPolicy
    from .recipe import Recipe as Recipe
    from .recipe import read_recipe as read_recipe
    from .sampling import Progress as Progress
    from .schedule import Schedule as Schedule
    from .schedule import Segment as Segment
    from .schedule import unwarp as unwarp
    from .schedule import warp as warp


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'piflow_edge' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__():
    return sorted(__all__)
