"""TensorRT as far as it is called here: the members a real release has, and behind them ONNX Runtime on the CPU.

`pretend(release)` makes a module whose classes have exactly the members and parameters that were recorded of that
release (golden/tensorrt_surface.json); a call that the release does not have fails as it would there. An "engine" is
the ONNX graph; it reads and writes at addresses, on a stream of the pretended driver (fake_driver.cpp).
"""

import base64
import ctypes
import enum
import json
import sys
import types
import weakref
from pathlib import Path

import numpy as np

from piflow_edge.engines.ort.importing import import_onnxruntime

SURFACE = json.loads((Path(__file__).parents[1] / "golden" / "tensorrt_surface.json").read_text())
RELEASES = SURFACE["Builder"]["__init__"]["(logger)"]
# For sitecustomize.py: installs it. Policies stay on the CPU, for the pretended GPU has few mixtures.
START = """
from tests.helpers import pretended_tensorrt
from piflow_edge.kernels import gpu_arrays

pretended_tensorrt.install("10.3.0")
gpu_arrays.place_of = lambda device: None
"""


def pretend(release):
    """A module like tensorrt of this release."""
    module = types.ModuleType("tensorrt")
    module.__version__ = release
    for kind, members in SURFACE.items():
        here = {
            name: what for name, kinds in members.items() for what, found in kinds.items() if release in found
        }
        if here and all(what.startswith("=") for what in here.values()):
            values = {name: int(what[1:]) for name, what in here.items()}
            setattr(module, kind, enum.IntEnum(kind, values))
        elif here:
            setattr(module, kind, _class(module, kind, here))
    return module


def install(release):
    """Make it what `import tensorrt` brings."""
    sys.modules["tensorrt"] = pretend(release)
    return sys.modules["tensorrt"]


def _class(module, kind, members):
    behaviour = BEHAVIOURS.get(kind, object)
    namespace = {name: value for name, value in vars(behaviour).items() if name.startswith("_made")}
    for name, what in members.items():
        found = getattr(behaviour, name, None) if name != "__init__" else vars(behaviour).get(name)
        if what == "":
            namespace[name] = found if isinstance(found, property) else _unknown(kind, name)
        else:
            namespace[name] = _check_call(kind, name, what, found)
    if kind not in ("ILogger", "Logger"):  # Python classes are made of those

        def set_known(self, name, value):
            if name not in members and not name.startswith("_"):
                raise AttributeError(f"{kind} of TensorRT {module.__version__} has no {name}")
            object.__setattr__(self, name, value)

        namespace["__setattr__"] = set_known
    made = type(kind, (), namespace)
    made._trt = module
    return made


def _unknown(kind, name):
    def fail(self):
        raise NotImplementedError(f"the stand-in has no {kind}.{name}")

    return property(fail)


def _check_call(kind, name, what, found):
    alternatives = [
        [word.strip() for word in one.strip("() ").split(",") if word.strip()] for one in what.split("|")
    ]

    def call(self, *arguments, **named):
        def fits(wanted):
            if wanted == ["..."]:
                return True
            words = [word.rstrip("?") for word in wanted]
            given = [*words[: len(arguments)], *named]
            needed = {word for word in wanted if not word.endswith("?")}
            return len(arguments) <= len(words) and set(named) <= set(words) and needed <= set(given)

        if not any(fits(one) for one in alternatives):
            raise TypeError(f"{kind}.{name} takes {what}; got {arguments}, {named}")
        if found is None:
            raise NotImplementedError(f"the stand-in has no {kind}.{name}")
        return found(self, *arguments, **named)

    return call


_ERROR = types.SimpleNamespace(name="ERROR")


class _Bytes:
    """IHostMemory: `bytes` of it are the content."""

    def __init__(self, data):
        self.data = data

    def __buffer__(self, flags):  # Python 3.12
        return memoryview(self.data)

    def __bytes__(self):
        return self.data


class Logger:
    def __init__(self):
        pass


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        names = {
            int(member): name for name, member in self._trt.NetworkDefinitionCreationFlag.__members__.items()
        }
        network = self._trt.INetworkDefinition.__new__(self._trt.INetworkDefinition)
        network._flags = {names[bit] for bit in range(8) if flags >> bit & 1}
        return network

    def create_builder_config(self):
        config = self._trt.IBuilderConfig.__new__(self._trt.IBuilderConfig)
        config._flags, config._pools, config._profiles, config._times = {"TF32"}, {}, [], None
        config._features, config._tactics = set(), None
        return config

    def create_optimization_profile(self):
        profile = self._trt.IOptimizationProfile.__new__(self._trt.IOptimizationProfile)
        profile._shapes = {}
        return profile

    def build_serialized_network(self, network, config):
        release = self._trt.__version__
        typed = "STRONGLY_TYPED" in network._flags
        if release.startswith("8") and "EXPLICIT_BATCH" not in network._flags:
            self._logger.log(_ERROR, "implicit batch")
            return None
        if typed and config._flags & {"FP16", "INT8", "BF16"}:
            self._logger.log(_ERROR, "a strongly typed network takes no precision flags")
            return None
        if config._times is not None:
            config._times._content += b"kernel;"
        for layer in network._layers:
            to = layer._casts_to
            if to and any(dtype != to for dtype in layer._pinned):
                self._logger.log(
                    _ERROR, "castLayer.cpp::validate: Assertion mOutputTypes.at(0).value() == params.toType"
                )
                return None
            if layer._type.name == "SHAPE" and layer._pinned:
                self._logger.log(_ERROR, "a shape is of no other type")
                return None
        (profile,) = config._profiles
        plan = {
            "release": release, "typed": typed, "tactics": config._tactics,
            "shares": not release.startswith("8") or "PROFILE_SHARING_0806" in config._features,
            "flags": sorted(config._flags), "pools": config._pools,
            "pinned": [layer._name for layer in network._layers if layer._pinned], "profile": profile._shapes,
            "layers": [_told_of(layer, typed, config) for layer in network._layers],
            "onnx": base64.b64encode(network._onnx).decode(),
        }  # fmt: skip
        return _Bytes(json.dumps(plan).encode())


def _told_of(layer, typed, config):
    """What the inspector will tell of a layer: the graph's types, or what flags and pins leave of them."""
    lowers = not typed and "FP16" in config._flags and not layer._pinned
    names = {"FLOAT": "FP32", "HALF": "FP16", "INT8": "Int8"}

    def tensor(graph_type):
        if not typed and graph_type in ("FLOAT", "HALF"):
            graph_type = layer._casts_to or ("HALF" if lowers else "FLOAT")
        return {"Format/Datatype": f"Row major linear {names.get(graph_type, graph_type)} format"}

    kind = "gemm" if layer._type.name == "MATRIX_MULTIPLY" else layer._type.name.lower()
    ins, outs = ([tensor(one) for one in types] for types in (layer._reads, layer._makes))
    return {"Name": layer._name, "LayerType": kind, "Inputs": ins, "Outputs": outs}


class IBuilderConfig:
    profiling_verbosity = property(
        lambda self: self._verbosity, lambda self, value: setattr(self, "_verbosity", value.name)
    )

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)

    def set_preview_feature(self, feature, enable):
        self._features.add(feature.name)

    def set_tactic_sources(self, tactic_sources):
        kinds = self._trt.TacticSource.__members__.items()
        self._tactics = sorted(name for name, kind in kinds if tactic_sources >> int(kind) & 1)
        return True

    def set_memory_pool_limit(self, pool, pool_size):
        self._pools[pool.name] = pool_size

    def create_timing_cache(self, serialized_timing_cache):
        times = self._trt.ITimingCache.__new__(self._trt.ITimingCache)
        times._content = bytes(serialized_timing_cache)
        return times

    def set_timing_cache(self, cache, ignore_mismatch):
        self._times = cache
        return True

    def get_timing_cache(self):
        return self._times

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1


class ITimingCache:
    def serialize(self):
        return _Bytes(self._content)

    def combine(self, input_cache, ignore_mismatch):
        self._content += input_cache._content
        return True


class IOptimizationProfile:
    def set_shape(self, input, min, opt, max):
        self._shapes[input] = [list(min), list(opt), list(max)]


class INetworkDefinition:
    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]


class ITensor:
    is_shape_tensor = property(lambda self: False)
    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._dtype)


class ILayer:
    name = property(lambda self: self._name)
    type = property(lambda self: self._type)
    num_outputs = property(lambda self: len(self._outputs))
    precision = property(lambda self: self._precision, lambda self, dtype: self._pinned.append(dtype.name))

    def get_output(self, index):
        return self._outputs[index]

    def set_output_type(self, index, dtype):
        self._pinned.append(dtype.name)


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        return types.SimpleNamespace(desc=lambda: self._errors[index])

    def parse(self, model, path=None):
        import onnx

        return self._made_read(onnx, onnx.load_from_string(bytes(model)))

    def parse_from_file(self, model):
        import onnx

        return self._made_read(onnx, onnx.load(model))  # with the weights in files beside it

    def _made_read(self, onnx, model):
        trt, network = self._network._trt, self._network
        unknown = [node.op_type for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"]
        if unknown:
            self._errors += [f"no importer for {name}" for name in unknown]
            return False
        model = onnx.shape_inference.infer_shapes(model)
        values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
        types_of = {v.name: v.type.tensor_type.elem_type for v in values}
        types_of |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}

        def graph_type(name):
            return {10: "HALF", 6: "INT32", 7: "INT64", 3: "INT8", 2: "INT8"}.get(
                types_of.get(name, 1), "FLOAT"
            )

        def made(
            name, shape, elem_type=1
        ):  # a parser infers no types: all but inputs read FLOAT until the build
            tensor = trt.ITensor.__new__(trt.ITensor)
            dtype = {10: "HALF", 6: "INT32", 7: "INT64"}.get(elem_type, "FLOAT")
            tensor._name, tensor._shape, tensor._dtype = name, shape, trt.DataType[_name_dtype(trt, dtype)]
            return tensor

        def layer_of(kind, name, node, outputs):
            layer = trt.ILayer.__new__(trt.ILayer)
            layer._type = trt.LayerType.__members__.get(kind, trt.LayerType.IDENTITY)  # 8.5 has no CAST
            layer._name, layer._pinned, layer._casts_to = name, [], None
            layer._outputs = [made(output, []) for output in outputs]
            layer._reads = [graph_type(name) for name in node.input if name]
            layer._makes = [graph_type(name) for name in node.output]
            network._layers.append(layer)
            return layer

        network._inputs = [
            made(
                v.name,
                [d.dim_value or -1 for d in v.type.tensor_type.shape.dim],
                v.type.tensor_type.elem_type,
            )
            for v in model.graph.input
        ]
        network._layers = []
        kinds = {"MatMul": "MATRIX_MULTIPLY", "Cast": "CAST", "Constant": "CONSTANT", "Shape": "SHAPE"}
        for count, node in enumerate(model.graph.node):
            if node.op_type == "Gather":  # one of those that a parser makes several layers of
                layer_of(
                    "SHUFFLE",
                    f"(Unnamed Layer* {count}) [Shuffle]",
                    node,
                    [f"(Unnamed Layer* {count})_output"],
                )
            kind = kinds.get(node.op_type, "ELEMENTWISE")
            layer = layer_of(kind, node.name or node.output[0], node, node.output)
            if node.op_type == "Cast":
                layer._casts_to = graph_type(node.output[0])
        network._onnx = model.SerializeToString()
        return True


def _name_dtype(trt, dtype):
    return "INT32" if dtype == "INT64" and "INT64" not in trt.DataType.__members__ else dtype


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            self._logger.log(_ERROR, "magic tag does not match")
            return None
        if plan["release"] != self._trt.__version__:
            self._logger.log(_ERROR, f"engine of {plan['release']}")
            return None
        onnxruntime = import_onnxruntime()

        engine = self._trt.ICudaEngine.__new__(self._trt.ICudaEngine)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        engine._plan, engine._contexts = plan, weakref.WeakSet()
        engine._session = onnxruntime.InferenceSession(
            base64.b64decode(plan["onnx"]), options, providers=["CPUExecutionProvider"]
        )
        ins, outs = engine._session.get_inputs(), engine._session.get_outputs()
        engine._io = {value.name: value for value in (*ins, *outs)}
        engine._inputs = [value.name for value in ins]
        return engine


class EngineInspector:
    def get_engine_information(self, format):
        assert format.name == "JSON"
        return json.dumps({"Layers": self._layers, "Bindings": []})


class ICudaEngine:
    def create_engine_inspector(self):
        inspector = self._trt.EngineInspector.__new__(self._trt.EngineInspector)
        inspector._layers = self._plan["layers"]
        return inspector

    num_io_tensors = property(lambda self: len(self._io))
    device_memory_size = property(lambda self: 1000)
    device_memory_size_v2 = property(lambda self: 1000)

    def get_tensor_name(self, index):
        return list(self._io)[index]

    def get_tensor_mode(self, name):
        return self._trt.TensorIOMode["INPUT" if name in self._inputs else "OUTPUT"]

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self._io[name].shape]

    def get_tensor_dtype(self, name):
        kind = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64", "tensor(float16)": "HALF"}
        return self._trt.DataType[_name_dtype(self._trt, kind[self._io[name].type])]

    def get_tensor_profile_shape(self, name, profile_index):
        return self._plan["profile"][name]

    def create_execution_context(self, strategy=None):
        assert strategy is self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._made_context()

    def create_execution_context_without_device_memory(self):
        return self._made_context()

    def _made_context(self):
        if len(self._contexts) and not self._plan["shares"]:
            return None  # the profile is another context's
        context = self._trt.IExecutionContext.__new__(self._trt.IExecutionContext)
        context._engine, context._shapes, context._addresses, context._memory = self, {}, {}, 0
        context._ready = False
        self._contexts.add(context)
        return context


class IExecutionContext:
    device_memory = property(
        lambda self: self._memory, lambda self, pointer: setattr(self, "_memory", pointer)
    )

    def set_device_memory(self, memory, size):
        assert size >= 1000
        self._memory = memory

    def set_input_shape(self, name, shape):
        least, _, most = self._engine._plan["profile"][name]
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        lengths = {
            size: self._shapes[given][place]
            for given in self._engine._inputs
            for place, size in enumerate(self._engine._io[given].shape)
            if isinstance(size, str)
        }
        return [lengths.get(size, size) for size in self._engine._io[name].shape]

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle):
        engine = self._engine
        complete = self._addresses.keys() == engine._io.keys() and self._shapes.keys() == set(engine._inputs)
        if not self._memory or not complete:
            return False
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        if not self._ready and _DRIVER.fake_is_captured(ctypes.c_void_p(stream_handle)):
            return False  # the first call sets things up
        self._ready = True
        _QUEUED.append((engine, addresses, shapes))
        number = len(_QUEUED) - 1
        return _DRIVER.fake_call(ctypes.c_void_p(stream_handle), _CALLBACK, number) == 0


_QUEUED = []
COUNTS = {"runs": 0}


def _run(number):
    engine, addresses, shapes = _QUEUED[number]
    COUNTS["runs"] += 1
    feeds = {}
    for name, shape in shapes.items():
        held = np.dtype(
            {"INT32": np.int32, "INT64": np.int64}.get(engine.get_tensor_dtype(name).name, np.float32)
        )
        feeds[name] = _at(addresses[name], shape, held).astype(np.int64 if held.kind == "i" else np.float32)
    names = [name for name in engine._io if name not in engine._inputs]
    for name, value in zip(names, engine._session.run(names, feeds), strict=True):
        _at(addresses[name], value.shape, value.dtype)[...] = value


def _at(address, shape, dtype):
    count = int(np.prod(shape))
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype).reshape(shape)


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int)(_run)
try:
    _DRIVER = ctypes.CDLL("libcuda.so.1")  # fake_driver.cpp, in a process made for it
except OSError:
    _DRIVER = None

BEHAVIOURS = {
    "ILogger": Logger, "Builder": Builder, "IBuilderConfig": IBuilderConfig, "ITimingCache": ITimingCache,
    "IOptimizationProfile": IOptimizationProfile, "INetworkDefinition": INetworkDefinition, "ITensor": ITensor,
    "EngineInspector": EngineInspector, "ILayer": ILayer, "OnnxParser": OnnxParser, "Runtime": Runtime,
    "ICudaEngine": ICudaEngine, "IExecutionContext": IExecutionContext,
}  # fmt: skip
