"""Few-step flow-matching generators: distil with pi-Flow, export, and run without PyTorch.

Names load on first use, so that `import piflow_edge` and `piflow-edge --help` cost next to nothing and
never bring in torch, onnx, onnxruntime or tensorrt.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# Public name -> the module that holds it. The same list, for type checkers, stands below.
_HOMES = {
    "__version__": "version",
    "warp": "schedule",
    "unwarp": "schedule",
    "Schedule": "schedule",
    "Segment": "schedule",
    "GMPolicy": "policies",
    "DXPolicy": "policies",
    "rollout": "kernels.rollout",
    "philox_normal": "kernels.normal",
    "load": "runtime.loading",
    "demo_bundle": "bundle.folder",
    "Generator": "runtime.generator",
    "Result": "runtime.result",
    "Progress": "runtime.drawing.observer",
    "SamplingSettings": "sampling_settings",
    "Recipe": "runtime.recipe",
    "read_recipe": "runtime.recipe",
    "Cancelled": "errors",
    "EngineOptions": "engines",
    "PiFlowError": "errors",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]  # one list of the names is enough

if TYPE_CHECKING:
    from piflow_edge.bundle.folder import demo_bundle as demo_bundle
    from piflow_edge.engines import EngineOptions as EngineOptions
    from piflow_edge.errors import Cancelled as Cancelled
    from piflow_edge.errors import PiFlowError as PiFlowError
    from piflow_edge.kernels.normal import philox_normal as philox_normal
    from piflow_edge.kernels.rollout import rollout as rollout
    from piflow_edge.policies import DXPolicy as DXPolicy
    from piflow_edge.policies import GMPolicy as GMPolicy
    from piflow_edge.runtime.drawing.observer import Progress as Progress
    from piflow_edge.runtime.generator import Generator as Generator
    from piflow_edge.runtime.loading import load as load
    from piflow_edge.runtime.recipe import Recipe as Recipe
    from piflow_edge.runtime.recipe import read_recipe as read_recipe
    from piflow_edge.runtime.result import Result as Result
    from piflow_edge.sampling_settings import SamplingSettings as SamplingSettings
    from piflow_edge.schedule import Schedule as Schedule
    from piflow_edge.schedule import Segment as Segment
    from piflow_edge.schedule import unwarp as unwarp
    from piflow_edge.schedule import warp as warp
    from piflow_edge.version import __version__ as __version__


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'piflow_edge' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__():
    return sorted(__all__)
