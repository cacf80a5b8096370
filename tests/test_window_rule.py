"""The window rule in C++ (host and device) against the one in Python, exhaustively, and its inverse."""

import ctypes

import numpy as np
import pytest

from jax_na._window import group_length, visible, window_bounds

MAX_LENGTH = 24


@pytest.fixture(scope="module")
def library(compile_library):
    return compile_library("tests/window_rule.cpp", flags=("-Icuda/common",))


def cpp_bounds(library, length, window, stride, causal):
    result = np.empty((length, 4), np.int32)
    library.bounds(length, window, stride, int(causal), result.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)))
    return result


@pytest.mark.parametrize("causal", [False, True])
def test_both_rules_and_the_inverse_agree(library, causal):
    for length in range(1, MAX_LENGTH + 1):
        positions = np.arange(length)
        for window in range(1, length + 1):
            for stride in range(1, window + 1):
                where = f"length={length} window={window} stride={stride} causal={causal}"
                found = cpp_bounds(library, length, window, stride, causal)
                begin, end = window_bounds(positions, length, window, stride, causal, np)
                np.testing.assert_array_equal(found[:, 0], begin, err_msg=where)
                np.testing.assert_array_equal(found[:, 1], end, err_msg=where)
                seen = (positions >= begin[:, None]) & (positions < end[:, None])  # [query, key]
                inverse = (positions[:, None] >= found[:, 2]) & (positions[:, None] < found[:, 3])
                np.testing.assert_array_equal(inverse, seen, err_msg=where)


def test_long_axes(library):
    rng = np.random.default_rng(0)
    for _ in range(200):
        length = int(rng.integers(1, 700))
        window = int(rng.integers(1, length + 1))
        stride = int(rng.integers(1, window + 1))
        causal = bool(rng.integers(2))
        found = cpp_bounds(library, length, window, stride, causal)
        positions = np.arange(length)
        begin, end = window_bounds(positions, length, window, stride, causal, np)
        seen = (positions >= begin[:, None]) & (positions < end[:, None])
        np.testing.assert_array_equal(found[:, :2], np.stack([begin, end], 1))
        np.testing.assert_array_equal((positions[:, None] >= found[:, 2]) & (positions[:, None] < found[:, 3]), seen)


def test_group_length(library):
    for length in range(1, 40):
        for dilation in range(1, length + 1):
            sizes = [library.group_length(length, dilation, group) for group in range(dilation)]
            assert sizes == [group_length(length, dilation, np.asarray(group), np) for group in range(dilation)]
            assert sizes == np.bincount(np.arange(length) % dilation, minlength=dilation).tolist()


def test_every_query_sees_its_window_and_every_key_is_seen():
    """Dilation and positions: `visible` gives each query exactly its window, in its own group."""
    for length, window, stride, dilation in [(17, 5, 1, 3), (20, 4, 3, 2), (9, 9, 4, 1), (23, 3, 3, 7)]:
        positions = np.arange(length)
        seen = visible(positions, positions, length, window, stride, dilation, False, np)
        assert (seen.sum(1) == window).all()
        assert not (seen & (positions[:, None] % dilation != positions % dilation)).any()
