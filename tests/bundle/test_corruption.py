"""One byte anywhere in a bundle: changed, missing or too many, it is found."""

import random

import pytest

from piflow_edge.bundle.folder import Bundle
from piflow_edge.bundle.signing import sign_bundle
from piflow_edge.errors import BundleError
from tests.bundle.test_signature import write_keys

pytestmark = pytest.mark.torch

FILES = ("bundle.json", "bundle.sig", "student.fp32.onnx", "golden.npz", "preview.png", "LICENSE")
TRIALS = 60


def flip(data, chance):
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ chance.randrange(1, 256)]) + data[place + 1 :]


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def extend(data, chance):
    return data + chance.randbytes(chance.randrange(1, 9))


def swap_two(data, chance):
    """The same bytes in another order, which a plain sum would not see."""
    while True:
        i, j = sorted(chance.sample(range(len(data)), 2))
        if data[i] != data[j]:
            return data[:i] + data[j : j + 1] + data[i + 1 : j] + data[i : i + 1] + data[j + 1 :]


@pytest.fixture(scope="module")
def signed_bundle(shared_bundle, tmp_path_factory):
    import shutil

    folder = tmp_path_factory.mktemp("signed")
    private, _ = write_keys(folder, "ours")
    bundle = shutil.copytree(shared_bundle, folder / "bundle")
    sign_bundle(bundle, private)
    assert {file.name for file in bundle.iterdir()} == set(FILES)
    return bundle


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found(signed_bundle, name):
    file, chance = signed_bundle / name, random.Random(name)
    whole = file.read_bytes()
    damages = [flip] * TRIALS + [cut, extend, swap_two] * (TRIALS // 6)
    try:
        for damage in damages:
            file.write_bytes(damage(whole, chance))
            with pytest.raises(BundleError):
                Bundle(signed_bundle)
    finally:
        file.write_bytes(whole)
    Bundle(signed_bundle)  # and only damage is
