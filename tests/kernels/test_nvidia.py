"""Memory, streams and CUDA graphs, as the driver wants them; in a process with a pretended one."""

import pytest

from tests.helpers.pretended_gpu import ROOT, fake_driver, run_on_fake_driver

CODE = """
import ctypes
import numpy as np
from piflow_edge.errors import EngineError
from piflow_edge.kernels import nvidia
from piflow_edge.kernels.device_arrays import is_on_gpu, stream_of, view
from piflow_edge.kernels.gpu_arrays import DeviceArray

fake = ctypes.CDLL("libcuda.so.1")
counts = lambda: [fake.fake_count(i) for i in range(3)]  # bytes, streams, graphs


def refused(call):
    try:
        call()
    except EngineError as error:
        return str(error)
    raise AssertionError("nothing was refused")

"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = fake_driver(tmp_path_factory.mktemp("driver"))
    return lambda code: run_on_fake_driver(folder, "-c", CODE + code)


def test_a_gpu_tells_of_itself(run):
    run(
        """
assert nvidia.name(0) == "Pretended GPU"
assert nvidia.device(0).compute_capability == "8.7" and nvidia.shares_memory(0)
assert nvidia.Device("sm_120", 1, 1).compute_capability == "12.0"
held = nvidia.Memory(0, 1 << 20)
assert nvidia.memory(0) == ((1 << 30) - (1 << 20), 1 << 30)
held.free()
held.free()
assert nvidia.memory(0) == (1 << 30, 1 << 30)
"""
    )


def test_memory_that_is_not_there_is_asked_for_in_vain(run):
    run(
        """
words = refused(lambda: nvidia.Memory(0, 3 << 30))
assert "1024 of its 1024 MiB free and cannot give 3072.0 more" in words, words
"""
    )


def test_recorded_work_is_done_at_each_launch_and_not_before(run):
    run(
        """
there, back = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
memory, one, other = nvidia.Memory(0, 16), nvidia.Stream(0), nvidia.Stream(0)


def work():
    nvidia.copy(0, memory.pointer, there.ctypes.data, 16, one.handle)
    nvidia.copy(0, back.ctypes.data, memory.pointer, 16, one.handle)


recording = nvidia.Recording(0, one.handle, work)
assert not back.any()
for _ in range(2):
    there += 1
    recording.launch(other.handle)
    assert (back == there).sum() == 0  # it is queued
    nvidia.wait_for(other.handle)
    np.testing.assert_array_equal(back, there)
nvidia.after(0, one.handle, other.handle)
assert counts() == [16, 2, 1]
del recording, memory, one, other
assert counts() == [0, 0, 0]
"""
    )


def test_what_cannot_be_recorded_is_an_error_and_leaves_the_stream_usable(run):
    run(
        """
stream, memory = nvidia.Stream(0), nvidia.Memory(0, 4)
breaks = lambda: fake.fake_invalidate(ctypes.c_void_p(stream.handle))
words = refused(lambda: nvidia.Recording(0, stream.handle, breaks))
assert "CAPTURE_INVALIDATED" in words, words


def fails():
    raise EngineError("in the midst of it")


assert "in the midst" in refused(lambda: nvidia.Recording(0, stream.handle, fails))
nvidia.fill(0, memory.pointer, 7, 4, stream.handle)
nvidia.wait_for(stream.handle)
assert ctypes.string_at(memory.pointer, 4) == bytes([7] * 4)
assert counts() == [4, 1, 0]
"""
    )


def test_our_arrays_on_a_gpu_speak_its_interface(run):
    run(
        """
memory = nvidia.Memory(0, 32)
array = DeviceArray(memory.pointer, "int64", (4,), 0, memory, stream=0)
interface = array.__cuda_array_interface__
assert interface["typestr"] == "<i8" and interface["data"] == (memory.pointer, False) and interface["stream"] == 1
assert is_on_gpu(array) and stream_of(array) == 0
assert view("labels", array, 0, ("int64",)) is array


class Other:  # another library's, which hands the interface on
    __cuda_array_interface__ = interface


assert view("labels", Other(), 0, ("int64",)).pointer == memory.pointer
bfloat16 = DeviceArray(memory.pointer, "bfloat16", (16,), 0, memory)
assert not hasattr(bfloat16, "__cuda_array_interface__") and view("x", bfloat16, 0) is bfloat16
"""
    )


def test_a_process_that_used_the_gpu_ends_without_a_word(run):
    done = run(
        """
from piflow_edge.kernels import gpu_arrays as xp

nvidia.compile_source = lambda arch, defines, source: b"arrays"
place = xp.place(0)  # a stream for the life of the process
array = xp.asarray(np.ones(4, np.float32), device=place) + 1
_ = array * 2  # whose memory is kept for the next array
buffer = nvidia.upload(0, bytes(16))
stream, memory = nvidia.Stream(0), nvidia.Memory(0, 16)
recording = nvidia.Recording(0, stream.handle, lambda: nvidia.fill(0, memory.pointer, 1, 16, stream.handle))
circle = [memory, recording]
circle.append(circle)
import sys
sys.held_to_the_end = [nvidia.Memory(0, 16), nvidia.Stream(0), array, circle]
"""
    )
    assert done.stderr == ""


def test_no_class_cleans_up_by_del():
    # It runs at the end of the process too, when the names that it uses are gone: use weakref.finalize.
    for folder in ("piflow_edge", "engines", "export"):
        for file in (ROOT / folder).rglob("*.py"):
            assert "def __del__" not in file.read_text(), file
