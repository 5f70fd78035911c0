"""What a graph reaches for is found wherever protobuf can hold it; a file that can be read in two ways is refused."""

import time

import numpy as np
import pytest

from piflow_edge.engines import ENGINES, Graph, open_engine, read_graph_file
from piflow_edge.errors import EngineError
from piflow_edge.system.onnx_outline import check_outline, read_outline
from tests.helpers.protobuf import FLOAT, OPSET, entry, graph, message, model, node, outside, value

SECRET = outside("secret.bin")
INSIDE = message((1, 4), (2, FLOAT), (8, "w"), (9, np.arange(4, dtype=np.float32).tobytes()))
WEIGHT = (5, INSIDE)
THERE = entry("location", "weights")


def attribute(*fields):
    return message((1, "a"), *fields)


def constant(*fields):
    """A node whose attribute has these fields."""
    return 1, node("Constant", [], ["q"], attribute(*fields))


def choice(*fields):
    """A node with a subgraph of these fields."""
    return 1, node("If", ["c"], ["z"], attribute((6, message(*fields))))


def place(*entries):
    """A weight's type and shape, and these entries of its external data."""
    return message((1, 4), (2, FLOAT), *entries)


def subgraph(*fields, depth=1):
    found = message(*fields)
    for _ in range(depth):
        found = message((1, node("If", ["c"], ["z"], attribute((20, 5), (6, found)))))
    return found


def refuse(data, words, files=None):
    with pytest.raises(EngineError, match=words):
        check_outline(read_outline(data), files or {})


# --- everywhere a tensor can be

DEEP = subgraph(constant((5, SECRET)), depth=4)
PLACES = {
    "initialiser": model((5, SECRET)),
    "after nodes and outputs": model(WEIGHT, (5, outside("secret.bin", name="unused"))),
    "Constant": model((1, node("Constant", [], ["w"], attribute((20, 4), (5, SECRET))))),
    "Constant that says it is a number": model(WEIGHT, constant((20, 2), (5, SECRET))),
    "Constant without a type": model(WEIGHT, constant((5, SECRET))),
    "one of many tensors": model(WEIGHT, constant((10, INSIDE), (10, SECRET))),
    "subgraph": model(WEIGHT, choice((5, SECRET))),
    "one of many subgraphs": model(WEIGHT, constant((11, b""), (11, message((5, SECRET))))),
    "subgraph's Constant, deep": model(WEIGHT, constant((6, DEEP))),
    "function's node": model(WEIGHT, more=[(25, message((1, "F"), (10, "f"), (7, constant((5, SECRET))[1])))]),
    "function's default": model(WEIGHT, more=[(25, message((1, "F"), (11, attribute((5, SECRET)))))]),
    "sparse initialiser's values": model((15, message((1, SECRET), (2, INSIDE), (3, 4)))),
    "sparse initialiser's indices": model((15, message((1, INSIDE), (2, SECRET), (3, 4)))),
    "sparse attribute": model(WEIGHT, constant((22, message((1, SECRET))))),
    "sparse attributes": model(WEIGHT, constant((23, message((1, SECRET))))),
    "training's first run": model(WEIGHT, more=[(20, message((1, message((5, SECRET)))))]),
    "training's algorithm": model(WEIGHT, more=[(20, message((2, message((5, SECRET)))))]),
    "a model written backwards": message((7, graph((5, SECRET))), OPSET, (1, 8)),
    "address in memory": model((5, outside("*/_ORT_MEM_ADDR_/*", offset=4096, length=16))),
    "absolute": model((5, outside("/etc/passwd", length=16))),
    "no name": model((5, outside(""))),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_did_not_come_along_is_refused_wherever_it_is_named(place):
    refuse(PLACES[place], "lies in the file .*, which did not come")


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_no_engine_opens_it(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(16))
    with pytest.raises(EngineError, match=r"secret\.bin"):
        open_engine(Graph(PLACES["initialiser"]), engine=engine)


def test_onnx_runtime_would_read_a_file_of_the_current_folder(tmp_path, monkeypatch):
    """The reason for all this, with the library itself. A release that no longer does is welcome."""
    ort = pytest.importorskip("onnxruntime")
    branch = message(
        (2, "b"),
        (1, node("Identity", ["q"], ["z"])),
        (5, outside("secret.bin", name="q")),
        (12, value("z", 4)),
    )
    branches = [message((1, f"{name}_branch"), (20, 5), (6, branch)) for name in ("then", "else")]
    truth = message((2, 9), (8, "c"), (9, b"\x01"))
    data = model((5, truth), (1, node("If", ["c"], ["w"], *branches)))
    monkeypatch.chdir(tmp_path)
    secret = np.arange(4, dtype=np.float32) + 7
    (tmp_path / "secret.bin").write_bytes(secret.tobytes())
    options = ort.SessionOptions()
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        pytest.skip(f"onnxruntime {ort.__version__} takes no weights from memory")
    # In memory, with other numbers: for a subgraph the library takes the file on the disk all the same.
    options.add_external_initializers_from_files_in_memory(["secret.bin"], [bytes(16)], [16])
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.zeros(4, np.float32)})
    if np.array_equal(found, secret):
        refuse(data, "main graph", {"secret.bin": 16})


def test_a_file_that_came_along_serves_weights_of_the_main_graph():
    data = model((5, outside("weights", offset=4, length=16)))
    check_outline(read_outline(data), {"weights": 20})
    whole = Graph(data, {"weights": np.arange(5, dtype=np.float32).tobytes()})
    whole.check()
    x = np.zeros(4, np.float32)
    np.testing.assert_array_equal(open_engine(whole, engine="reference").run({"x": x})["y"], [1, 2, 3, 4])


@pytest.mark.parametrize("place", ["Constant", "subgraph", "function's node", "sparse attribute"])
def test_it_does_not_serve_any_other(place):
    refuse(PLACES[place], "main graph", {"secret.bin": 1 << 20})


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (outside("weights", offset=1), r"1, 16 bytes.* 16"),
        (outside("weights", dims=(4, 2)), r"0, 32 bytes.* 16"),
        (outside("weights", dims=(4, 2), length=16), "32 bytes takes 16"),
        (outside("weights", dims=(1 << 40, 1 << 40)), "of 16"),
        (outside("weights", dims=(2**64 - 1,)), "the shape"),
        (outside("weights", offset=-1), "offset is '-1'"),
        (outside("weights", offset="0x0"), "offset is '0x0'"),
        (outside("weights", offset=" 0"), "offset is ' 0'"),
        (outside("weights", length="٤"), "length is"),
        (outside("weights", offset=10**30), "offset is '1000"),
        (message((1, 4), (2, 8), THERE, (14, 1)), "the type 8"),
        (message((1, 4), (2, 99), THERE, (14, 1)), "the type 99"),
        (outside("weights", basepath="/etc"), "'basepath'"),
        (message((1, b"\x04" * 17), (2, 1), entry("location", "weights"), (14, 1)), "more than 16 numbers"),
    ],
)  # fmt: skip
def test_more_than_the_file_holds_is_refused(weight, words):
    refuse(model((5, weight)), words, {"weights": 16})


# --- files that two readers may read in two ways


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        # A reader that takes the first place, or the last, sees a file that is there.
        (place(THERE, entry("location", "secret.bin"), (14, 1)), "'location'"),
        (place(entry("location", "secret.bin"), THERE, (14, 1)), "'location'"),
        (place((13, message((1, "location"), (2, "weights"), (2, "secret.bin"))), (14, 1)), "value.*twice"),
        (place((13, message((1, "checksum"), (2, "weights"), (1, "location"))), (14, 1)), "key.*twice"),
        (place((14, 0), THERE, (14, 1)), "data_location.*twice"),
        (place((14, 1), THERE, (14, 0)), "data_location.*twice"),
        # In the file or not?
        (place(THERE), "both"),
        (place((14, 0), THERE), "both"),
        (place((14, 1)), "both"),
        (place((14, 2), THERE), "both"),
        (place((14, 1 << 32 | 1), THERE), "both"),
        (place((14, 1), THERE, (9, bytes(16))), "both"),
        (place((14, 1), THERE, (4, bytes(16))), "both"),
        # Of which type, and so how long?
        (place((2, 11), (14, 1), THERE), "data_type.*twice"),
    ],
)  # fmt: skip
def test_a_weight_that_can_be_read_in_two_ways_is_refused(weight, words):
    refuse(model((5, weight)), words, {"weights": 16})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        # Protobuf merges these: a reader that takes only one of them misses what the other holds.
        (message((1, 8), OPSET, (7, graph(WEIGHT)), (7, message((5, SECRET)))), "graph.*twice"),
        (message((1, 8), OPSET, (7, message((5, SECRET))), (7, graph(WEIGHT))), "graph.*twice"),
        (model(WEIGHT, constant((5, INSIDE), (5, message((14, 1))))), "t of .*twice"),
        (model(WEIGHT, constant((6, b""), (6, message((5, SECRET))))), "g of .*twice"),
        (model((15, message((1, INSIDE), (1, SECRET)))), "values.*twice"),
        (model(WEIGHT, more=[(20, message((2, b""), (2, message((5, SECRET)))))]), "algorithm.*twice"),
        (model(WEIGHT, (1, node("Add", [], []) + message((4, "Celu")))), "op_type.*twice"),
        (model(WEIGHT, (1, message((4, "Add"), (7, ""), (7, "com.example")))), "domain.*twice"),
        # What a later release may know and this one does not, it would not look into.
        (model(WEIGHT, more=[(99, message((5, SECRET)))]), "field 99"),
        (model(WEIGHT, (17, SECRET)), "field 17"),
        (model(WEIGHT, constant((24, SECRET))), "field 24"),
        (message((0, 1)), "field 0"),
        # A known field of another wire type is an unknown one to protobuf.
        (message((7, 5)), r"number .*message"),
        (message((1, b"8")), r"bytes .*number"),
        (b"\x3b\x3c", "wire type 3"),
        # ONNX Runtime's own format begins so, whatever follows.
        (message((2, b"\x00\x00ORTM" + bytes(64))), "own format"),
    ],
)  # fmt: skip
def test_a_file_that_can_be_read_in_two_ways_is_refused(data, words):
    refuse(data, words)


# --- operators


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (model(WEIGHT, (1, node("Run", [], ["z"], domain="com.example"))), r"'Run' of the domain 'com\.example'"),
        (model(WEIGHT, choice((1, node("Run", [], [], domain="ai.onnx.contrib")))), "contrib"),
        (model(WEIGHT, more=[(25, message((1, "F"), (10, "f"), (7, node("Run", [], [], domain="x"))))]), "'Run'"),
        (model(WEIGHT, (1, node("Add", [], [], domain="AI.ONNX"))), "AI.ONNX"),
        (model(WEIGHT, (1, node("EPContext", [], [], domain="com.microsoft"))), "compiled engine"),
        (model(WEIGHT, more=[(25, message((1, "EPContext"), (10, "com.microsoft")))]), "compiled engine"),
    ],
)  # fmt: skip
def test_an_operator_that_may_do_more_than_compute_is_refused(data, words):
    refuse(data, words)


def test_operators_of_the_standard_of_onnx_runtime_and_of_the_file_itself_pass():
    own = message((1, "F"), (10, "mine"), (7, node("Neg", ["x"], ["y"])))
    used = [("Neg", "ai.onnx"), ("MatMulNBits", "com.microsoft"), ("F", "mine")]
    nodes = [(1, node(name, [], [], domain=domain)) for name, domain in used]
    data = model(WEIGHT, *nodes, more=[(25, own)])
    check_outline(read_outline(data), {})
    refuse(data + message((7, b"")), "twice")


# --- hostile sizes end soon


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff" * 11, "more than 64 bits"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "where 0 are left"),
        (model((5, SECRET))[:-1], "are left"),
        (model(WEIGHT, constant((6, subgraph(WEIGHT, depth=8)))), "8 deep"),
        (message((7, b"\x0a\x00" * (2 << 20))), "more than 1048576 parts"),
        (model(WEIGHT, (1, node("x" * 10**7, [], []))), "10000000 characters: 'xxx"),
        (model((5, outside("x" * 10**7))), "10000000 characters: 'xxx"),
        (model(WEIGHT, (1, message((7, b"\xff")))), "not UTF-8"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_short_error_soon(data, words):
    start = time.process_time()
    with pytest.raises(EngineError, match=words) as caught:
        read_outline(data)
    assert len(str(caught.value)) < 400
    assert time.process_time() - start < 20  # some 3 s here; this is no benchmark


def test_nesting_without_end_does_not_end_the_stack():
    data = b""
    for _ in range(3000):
        data = message((6, message((1, message((5, data))))))
    refuse(model(WEIGHT, (1, node("If", [], [], data))), "nested more than")


@pytest.mark.parametrize("change", ["cut", "flip", "fill", "insert"])
def test_no_damage_does_more_than_raise_one_error(change):
    whole, draw, refused = PLACES["subgraph's Constant, deep"], np.random.default_rng(3), 0
    for trial in range(500):
        broken = bytearray(whole)
        place = int(draw.integers(len(whole)))
        if change == "cut":
            del broken[trial % len(whole) :]
        elif change == "flip":
            broken[place] ^= 1 << draw.integers(8)
        else:
            end = place + 5 if change == "fill" else place
            broken[place:end] = draw.integers(0, 256, 5).astype(np.uint8).tobytes()
        try:
            check_outline(read_outline(bytes(broken)), {})
        except EngineError:
            refused += 1
    assert refused > 250


# --- files beside a graph


def test_a_graph_file_may_keep_weights_in_a_file_beside_it_only(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    values = np.arange(4, dtype=np.float32).tobytes()
    for place in (folder / "w.bin", tmp_path / "w.bin"):
        place.write_bytes(values)
    (folder / "link.bin").symlink_to(folder / "w.bin")
    (folder / "m.onnx").write_bytes(model((5, outside("w.bin"))))
    assert read_graph_file(folder / "m.onnx").weights == {"w.bin": values}
    for location in (
        "../w.bin",
        str(tmp_path / "w.bin"),
        "link.bin",
        "none.bin",
        "",
        ".",
        "x\0y",
        "w.bin/",
        "./w.bin",
    ):
        (folder / "m.onnx").write_bytes(model((5, outside(location))))
        with pytest.raises(EngineError, match="did not come"):
            read_graph_file(folder / "m.onnx")
    with pytest.raises(EngineError, match="cannot be read"):
        read_graph_file(folder / "none.onnx")


# --- what a graph takes and gives


def test_inputs_and_outputs_are_read_and_weights_are_not_among_them():
    named = message((1, message((2, "batch"))), (1, message((1, 3))), (1, b""))
    half = message((1, "z"), (2, message((1, message((1, 10), (2, named))))))
    untyped, listed = message((1, "untyped")), message((1, "listed"), (2, message((4, b""))))
    found = read_outline(model(WEIGHT, (11, value("w", 4)), (12, half), (12, untyped), (12, listed)))
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.inputs] == [("x", "float32", (4,))]
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.outputs] == [
        ("z", "float16", (None, 3, None)), ("untyped", None, None), ("listed", None, None), ("y", "float32", (4,)),
    ]  # fmt: skip


def test_those_of_subgraphs_are_not_the_graphs_own():
    found = read_outline(model(WEIGHT, choice((11, value("inner", 4)), (12, value("inner", 4)))))
    assert [tensor.name for tensor in (*found.inputs, *found.outputs)] == ["x", "y"]


# --- what weights take


def test_weights_are_counted_by_their_bits_wherever_they_lie():
    bytes_of_int8 = message((1, 6), (2, 3), (8, "b"), (9, bytes(6)))
    data = model(
        WEIGHT, (5, outside("weights", length=16, name="v")), (5, bytes_of_int8), constant((5, INSIDE))
    )
    assert read_outline(data).weight_bytes == {32: 16 + 16, 8: 6}  # a node's own is none


@pytest.mark.parametrize(
    "dims",
    [
        message(*[(1, 2**62)] * 18),
        message((1, bytes(10 * [1])), (1, bytes(10 * [1]))),  # packed, ten and ten
        message(*[(1, 2**64 - 2**62)] * 3),
    ],
)
def test_axes_are_few_and_no_length_is_below_zero(dims):
    refuse(model((5, dims + message((2, FLOAT), (8, "w")))), r"weight 'w' has the shape \[.*\], and \d+ axes")


def test_what_a_weight_says_it_takes_is_no_more_than_can_be_there():
    huge = message(*[(1, 2**62)] * 4, (2, FLOAT), (8, "w"), (9, bytes(16)))
    assert read_outline(model((5, huge))).weight_bytes[32] < 1000


def test_a_million_axes_are_refused_at_once():
    refuse(model((5, message(*[(1, 2**62)] * 200_000))), "200000 axes")  # the product of all takes minutes
