"""Run by PyInstaller where a program imports piflow_edge: what its static look at imports cannot see.

Public names, engines and conditioners load on first use, by the names in their registries; networks, kernels and the
shipped bundles are files. Training, export, servers and the command line are not for such an app, and would bring
PyTorch along; a program that imports them by name gets them.
"""

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

_FOR_APPS = ("bundle", "conditioning", "engines", "kernels", "policies", "runtime", "system")
_NOT_FOR_APPS = ("piflow_edge.runtime.bulk", "piflow_edge.runtime.serve", "piflow_edge.kernels.build")
# Imported by name where there is an engine or a conditioner that needs them.
_LATE = (
    "onnxruntime",
    "tokenizers",
    "tensorrt",
    "cuda.bindings.driver",
    "cuda.bindings.runtime",
    "cuda.bindings.nvrtc",
)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would lie in
        return False


hiddenimports = [module for module in _LATE if _is_there(module)]
for part in _FOR_APPS:
    hiddenimports += collect_submodules(
        f"piflow_edge.{part}", filter=lambda module: not module.startswith(_NOT_FOR_APPS)
    )
hiddenimports += ["piflow_edge.schedule", "piflow_edge.sampling_settings", "piflow_edge.version"]
datas = collect_data_files("piflow_edge", includes=["assets/**/*"])
datas += collect_data_files("piflow_edge.bundle", includes=["*.json"])
# The kernels' library is no Python module; CUDA's source is compiled on the machine it runs on.
datas += collect_data_files("piflow_edge.kernels", includes=["*.so", "*.dylib", "*.dll", "*.cu", "*.h"])
