import math

import numpy as np
import pytest

from piflow_edge import PiFlowError, philox_normal
from piflow_edge.kernels import cpu
from piflow_edge.noise import _radius, _waves, philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known-answer vectors published with Random123 (philox4x32, 10 rounds)
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    words = philox(np.array(counter, np.uint64), key)
    assert " ".join(f"{word:08x}" for word in words) == expected


def test_a_batch_can_be_split_anywhere():
    whole = philox_normal(7, range(5), (3, 4, 4))
    parts = [philox_normal(7, range(2), (3, 4, 4)), philox_normal(7, range(2, 5), (3, 4, 4))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_seeds_images_and_draws_have_noise_of_their_own():
    streams = [
        philox_normal(seed, [index], (256,), draw=draw)[0]
        for seed in (0, 1, 2**32, 2**64 - 1)
        for index in (0, 1, 2**32)
        for draw in (0, 1)
    ]
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.3  # 4.8 standard deviations of 256 samples


def test_the_noise_is_standard_normal():
    noise = philox_normal(3, range(64), (4, 64, 63))
    n = noise.size
    assert noise.dtype == np.float32 and np.isfinite(noise).all()
    # Five standard errors of each moment.
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_the_stream_is_fixed_for_good(kernel):
    # Worked out by hand from the published zero-key block: words 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    u = [((word >> 8) + 0.5) / 2**24 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    r0, r1 = np.sqrt(-2 * np.log(u[0])), np.sqrt(-2 * np.log(u[2]))
    a0, a1 = 2 * np.pi * u[1], 2 * np.pi * u[3]
    expected = np.float32([r0 * np.cos(a0), r0 * np.sin(a0), r1 * np.cos(a1), r1 * np.sin(a1)])
    np.testing.assert_array_equal(philox_normal(0, [0], (4,), kernel=kernel)[0], expected)


@pytest.mark.parametrize(
    ("seed", "indices", "shape", "draw"),
    [
        (0, [0], (1,), 0),
        (7, [3, 2**63 + 1, 2**32], (3, 5, 7), 2**32 - 1),
        (2**64 - 1, range(40), (4, 32, 33), 1),  # on several threads
        (1, [], (2,), 0),
        (1, [0], (0, 2), 0),
    ],
)
def test_the_compiled_noise_is_that_of_numpy(seed, indices, shape, draw):
    ours = philox_normal(seed, indices, shape, draw=draw, kernel="cpu")
    expected = philox_normal(seed, indices, shape, draw=draw, kernel="reference")
    assert ours.dtype == np.float32 and ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)
    for isa in cpu.isas():
        again = cpu.normal(seed, np.array(indices, np.uint64), math.prod(shape), draw, isa=isa)
        np.testing.assert_array_equal(again.reshape(expected.shape), expected, err_msg=isa)


def test_the_series_are_the_functions_as_far_as_float64_goes():
    ends = [0, 1, 2**23 - 1, 2**23, 2**24 - 2, 2**24 - 1, 11863282, 11863283]  # and where ln's argument wraps
    quarters = [i * 2**21 + j for i in range(1, 8) for j in (-1, 0, 1)]
    k = np.array([*ends, *quarters, *np.random.default_rng(0).integers(0, 2**24, 10**5)], np.uint32)
    turn = 2 * np.pi * (k + 0.5) / 2**24
    np.testing.assert_allclose(_radius(k), np.sqrt(-2 * np.log((k + 0.5) / 2**24)), rtol=1e-15)
    for ours, theirs in zip(_waves(k), (np.cos(turn), np.sin(turn)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-15)


def test_a_kernel_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("piflow_edge.kernels.normal.cpu.missing", lambda: "it was not compiled")
    with pytest.raises(PiFlowError, match="not compiled"):
        philox_normal(0, [0], (2,), kernel="cpu")
    with pytest.raises(PiFlowError, match="auto, reference or cpu"):
        philox_normal(0, [0], (2,), kernel="gpu")
    np.testing.assert_array_equal(
        philox_normal(0, [0], (2,)), philox_normal(0, [0], (2,), kernel="reference")
    )


@pytest.mark.parametrize("arguments", [(-1, [0]), (2**64, [0]), (0, [-1]), (0, [2**64])])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(PiFlowError, match="whole number"):
        philox_normal(*arguments, (2,))
