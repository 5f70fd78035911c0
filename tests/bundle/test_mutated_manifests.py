"""Manifests that are well sealed and say anything: what comes of them is a picture, or one of our errors.

`PIFLOW_EDGE_EXAMPLES=10000 pytest tests/bundle/test_mutated_manifests.py` tries as many.
"""

import copy
import json
import os
import resource
import shutil

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import piflow_edge as pf
from piflow_edge.bundle.folder import demo_bundle
from piflow_edge.bundle.manifest import seal_manifest
from piflow_edge.commands.description import describe_manifest, describe_recorded_memory
from piflow_edge.errors import PiFlowError
from piflow_edge.runtime.verification import verify

EXAMPLES = int(os.environ.get("PIFLOW_EDGE_EXAMPLES", "150"))
BODY = json.loads((demo_bundle() / "bundle.json").read_bytes())
del BODY["sha256"]

ODD_WHOLE = [*range(11), 64, 255, 256, 1000, 10**6, 10**9, 2**31, 2**63, 10**18, 10**40, -1, -8, -(10**18)]
ODD_PARTS = [0.0, 0.5, 1.5, 1e-30, 1e-300, 1e18, 1e300, -0.5, -1e300]
KNOWN_WORDS = """
    batch x_t t means labels float32 float16 int64 complex64 gm dx gmk class none arrays text latents pixels auto inf
    nan student decoder sampler.nfe1 encoder.a student.fp32.onnx golden.npz LICENSE bundle.json ../x /etc/passwd fp16
    int8
"""
ODD_TEXTS = ["", "a\0b", "a\nb", "\x1b[2J", "\u202e", "x" * 300, "é"]

finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.sampled_from(ODD_WHOLE) | st.sampled_from(ODD_PARTS) | st.integers() | finite
texts = st.sampled_from([*KNOWN_WORDS.split(), *ODD_TEXTS]) | st.text(max_size=8)
plain = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=6
)


def places(body, path=()):
    """Every place in a JSON value, as the keys that lead there."""
    found = [path] if path else []
    inner = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in inner:
        if path[:1] != ("provenance",) or len(path) < 3:  # free text, of which few places are enough
            found += places(value, (*path, key))
    return found


PLACES = places(BODY)
ACTIONS = ("replace", "number", "remove", "copy", "rename", "swap", "repeat")
change = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(ACTIONS), values, numbers, st.sampled_from(PLACES)
)
changes = st.lists(change, min_size=1, max_size=3)


def holder_of(body, path):
    """What holds the place, and its key there; None where an earlier change took it away."""
    for key in path[:-1]:
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError):
            return None
    try:
        body[path[-1]]
    except (KeyError, IndexError, TypeError):
        return None
    return None if isinstance(body, str) else (body, path[-1])


def apply(body, path, action, value, number, other):
    place, source = holder_of(body, path), holder_of(body, other)
    if place is None:
        return
    holder, key = place
    if action == "replace":
        holder[key] = value
    elif action == "number":
        holder[key] = number
    elif action == "remove":
        del holder[key]
    elif action == "rename" and isinstance(holder, dict):
        holder[value if isinstance(value, str) else "more"] = holder.pop(key)
    elif action == "repeat" and isinstance(holder[key], list):
        holder[key] = holder[key] * 2
    elif action in ("copy", "swap") and source is not None:
        taken = copy.deepcopy(source[0][source[1]])
        if action == "swap":
            source[0][source[1]] = holder[key]
        holder[key] = taken


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shutil.copytree(demo_bundle(), tmp_path_factory.mktemp("mutated") / "digits")


@pytest.fixture
def one_gibibyte():
    """No more than 1 GiB above what the process has: who wants more gets a MemoryError, which is none of our errors."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def draw_from(folder):
    """Everything that a manifest leads to."""
    with pf.load(folder, engine="reference") as generator:
        steered = generator.conditioner.inputs
        result = generator(arrays=generator.conditioner.example(1), seed=1) if steered else generator(count=1)
        repr(generator), repr(result)
        describe_manifest(generator.bundle.manifest), describe_recorded_memory(generator.bundle.manifest)
        verify(generator)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited as Linux does")
def test_a_manifest_that_says_anything_makes_a_picture_or_one_of_our_errors(folder, one_gibibyte):
    outcomes = {"drawn": 0, "refused": 0}

    @settings(max_examples=EXAMPLES, deadline=60_000, database=None, derandomize=EXAMPLES < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(changes)
    def try_manifest(changes):
        body = copy.deepcopy(BODY)
        for change in changes:
            apply(body, *change)
        (folder / "bundle.json").write_bytes(seal_manifest(body))
        try:
            draw_from(folder)
        except PiFlowError as error:
            outcomes["refused"] += 1
            assert 0 < len(str(error)) < 2000
        else:
            outcomes["drawn"] += 1

    try_manifest()
    assert outcomes["refused"] > EXAMPLES // 3
