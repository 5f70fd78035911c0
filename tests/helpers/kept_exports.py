"""What PyTorch's exporter makes of a network, kept for the tests that export one of the same architecture.

It takes seconds even for a tiny network, and most tests of ours are about what is done with its result. Only
`torch.onnx.export` itself is spared, or made faster: our code around it runs in every test.
"""

import copy
import functools
import hashlib
import io
import os
import pickle
import types
from contextlib import contextmanager
from unittest import mock


class _Fingerprint(pickle.Pickler):
    """A module but for its weights' values, without addresses: modules of one architecture have equal bytes."""

    def __init__(self, file):
        super().__init__(file)
        self.fast = True  # which of its equal parts are one object does not count: torch.export alters that

    def reducer_override(self, value):
        import torch

        if isinstance(value, torch.nn.Parameter):
            return tuple, ((str(value.dtype), tuple(value.shape)),)
        if isinstance(value, torch.Tensor):
            array = value.numpy(force=True)
            return tuple, ((type(value).__name__, str(array.dtype), array.shape, array.tobytes()),)
        if (
            isinstance(value, types.FunctionType) and "<locals>" in value.__qualname__
        ):  # hooks of transformers
            return tuple, ((value.__module__, value.__qualname__, value.__code__.co_code),)
        if type(value).__name__ == "FrozenDict":  # the settings of a module of diffusers
            return tuple, (sorted((k, repr(v)) for k, v in value.items() if k != "_name_or_path"),)
        return NotImplemented


class _ExportedProgram:
    """An exported program, as far as our code looks at it. Whoever alters the model has one of his own."""

    def __init__(self, file, module):
        self._file, self._module = file, module

    @property
    def model_proto(self):
        import onnx

        model = onnx.load(self._file)
        weights = dict(self._module.named_parameters())
        for tensor in model.graph.initializer:
            name, turned, _ = tensor.doc_string.partition(_TURNED)
            if name:
                value = weights[name].numpy(force=True)
                value = (value.T if turned else value).reshape(tensor.dims)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        return model


# After the name of a weight that a graph holds with its axes in reverse order.
_TURNED = " .T"


def name_weights(model, module, example):
    """Say in each initialiser's documentation which weight of a module it is; False if one is in another form.

    The module's weights are to be random numbers, so that no two are alike. They are lost.
    """
    import torch
    from onnx import numpy_helper
    from torch.utils._pytree import tree_leaves

    places = {}
    for name, weight in module.named_parameters():
        value = weight.numpy(force=True)
        places[value.T.tobytes()] = name + _TURNED
        places[value.tobytes()] = name
    for tensor in model.graph.initializer:
        if (name := places.get(numpy_helper.to_array(tensor).tobytes())) is not None:
            tensor.doc_string = name
    found = {tensor.doc_string.removesuffix(_TURNED) for tensor in model.graph.initializer}
    others = [weight for name, weight in module.named_parameters() if name not in found]
    # What it does not use at all, such as the encoder beside a decoder, need not be in the graph.
    with torch.no_grad():
        for weight in others:
            weight.fill_(torch.nan)
        return not others or not any(torch.isnan(part).any() for part in tree_leaves(module(*example)))


@contextmanager
def kept_exports(folder):
    """A block in which of modules of one architecture, that differ in their weights at most, one is exported."""
    import torch

    export = torch.onnx.export

    def kept(module, example, **settings):
        # Weights that are in files our code takes out of the graph before it is optimised.
        if not settings.get("optimize", True):
            return export(module, example, **settings)
        shown = io.BytesIO()
        try:
            _Fingerprint(shown).dump((module, example))
        except (AttributeError, TypeError, ValueError):  # it holds what cannot be told apart, or itself
            return export(module, example, **settings)
        shown.write(repr(sorted(settings.items())).encode())
        file = folder / f"{hashlib.sha256(shown.getvalue()).hexdigest()}.onnx"
        if not file.exists():
            twin, draws = copy.deepcopy(module), torch.Generator().manual_seed(0)
            for weight in twin.parameters():
                torch.nn.init.uniform_(weight, generator=draws)
            model = export(twin, example, **settings).model_proto
            data = model.SerializeToString() if name_weights(model, twin, example) else b""
            # Not by our own means: some tests make those fail.
            work = folder / f"{os.urandom(8).hex()}.part"
            work.write_bytes(data)
            os.replace(work, file)
        if not file.stat().st_size:  # its weights are in the graph in another form
            return export(module, example, **settings)
        return _ExportedProgram(file, module)

    with mock.patch.object(torch.onnx, "export", kept), _one_registry():
        yield


@contextmanager
def _one_registry():
    """PyTorch gathers its translations of operators anew for every export: two of the five seconds of a tiny one."""
    from torch.onnx._internal.exporter import _registration

    gather = functools.cache(_registration.ONNXRegistry.from_torchlib)
    with mock.patch.object(_registration.ONNXRegistry, "from_torchlib", staticmethod(gather)):
        yield
