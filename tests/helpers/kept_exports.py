"""What PyTorch's exporter makes of a network, kept for the tests that export the same one.

It takes seconds even for a tiny network, and most tests of ours are about what is done with its result. Only
`torch.onnx.export` itself is spared: our code around it runs in every test.
"""

import hashlib
import io
import os
import pickle
import types
from contextlib import contextmanager
from unittest import mock


class _Fingerprint(pickle.Pickler):
    """Everything in a module, but no addresses: equal modules have equal bytes."""

    def __init__(self, file):
        super().__init__(file)
        self.fast = True  # which of its equal parts are one object does not count: torch.export alters that

    def reducer_override(self, value):
        import torch

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

    def __init__(self, data):
        self._data = data

    @property
    def model_proto(self):
        import onnx

        return onnx.load_from_string(self._data)


@contextmanager
def kept_exports(folder):
    """A block in which a module that was exported once is not exported again."""
    import torch

    export = torch.onnx.export

    def kept(module, example, **settings):
        shown = io.BytesIO()
        try:
            _Fingerprint(shown).dump((module, example))
        except (AttributeError, TypeError, ValueError):  # it holds what cannot be told apart, or itself
            return export(module, example, **settings)
        shown.write(repr(sorted(settings.items())).encode())
        file = folder / f"{hashlib.sha256(shown.getvalue()).hexdigest()}.onnx"
        if not file.exists():
            # Not by our own means: some tests make those fail.
            work = folder / f"{os.urandom(8).hex()}.part"
            work.write_bytes(export(module, example, **settings).model_proto.SerializeToString())
            os.replace(work, file)
        return _ExportedProgram(file.read_bytes())

    with mock.patch.object(torch.onnx, "export", kept):
        yield
