"""What the fused kernels decide on the host: tile boxes and the size of the workspace, which Python mirrors."""

import ctypes
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_na import _cuda
from jax_na._spec import Inputs, make_spec


@pytest.fixture(scope="module")
def library(compile_library):
    loaded = compile_library("tests/fused_host.cpp")
    loaded.workspace_bytes.restype = ctypes.c_int64
    loaded.choose_tile.restype = ctypes.c_double
    return loaded


def random_problem(rng):
    rank = int(rng.integers(1, 4))
    axes = []
    for _ in range(rank):
        length = int(rng.integers(1, 80))
        dilation = int(rng.integers(1, min(4, length) + 1))
        window = int(rng.integers(1, length // dilation + 1))
        axes.append((length, length, window, int(rng.integers(1, window + 1)), dilation, int(rng.integers(2))))
    return [(1, 1, 1, 1, 1, 0)] * (3 - rank) + axes, rank


def as_array(axes, rank, heads=1, kv_heads=1, dim=8, dim_v=8, extra=0, batch=1):
    values = [rank, heads, kv_heads, dim, dim_v, extra, batch, *(v for axis in axes for v in axis)]
    return np.array(values, np.int32)


def pointer(array):
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


def test_a_tile_fits_the_kernel_and_the_tiles_cover_every_axis(library):
    rng = np.random.default_rng(0)
    for _ in range(100):
        axes, rank = random_problem(rng)
        for rows in (16, 64, 128):
            for rows_are_keys in (0, 1):
                choice = np.zeros(6, np.int32)
                library.choose_tile(pointer(as_array(axes, rank)), rows_are_keys, rows, 64, pointer(choice))
                box, tiles = choice[:3], choice[3:]
                assert 1 <= math.prod(box.tolist()) <= rows, (axes, choice)
                for (length, _, _, _, dilation, _), size, count in zip(axes, box, tiles, strict=True):
                    longest = -(-length // dilation)
                    assert size * (count - 1) < longest <= size * count, (axes, choice)


@pytest.mark.parametrize(
    "length, window, limit",
    [((16384,), (512,), 640), ((128, 128), (32, 32), 1530), ((31, 136, 240), (11, 11, 11), 2800), ((56, 56), (7, 7), 197)],
)
def test_the_union_of_a_tile_is_tight(library, length, window, limit):
    axes = [(1, 1, 1, 1, 1, 0)] * (3 - len(length)) + [(n, n, k, 1, 1, 0) for n, k in zip(length, window, strict=True)]
    choice = np.zeros(6, np.int32)
    assert library.choose_tile(pointer(as_array(axes, len(length))), 0, 64, 64, pointer(choice)) <= limit


@pytest.mark.parametrize("rows_are_keys", [0, 1])
def test_a_shard_is_not_taken_for_a_short_axis(library, rows_are_keys):
    """A middle shard of a quarter: 16 of 64 queries and their halo of a 33 wide window. Its tiles see as much as any."""
    choice = np.zeros(6, np.int32)
    axes = [(1, 1, 1, 1, 1, 0), (64, 64, 5, 1, 1, 0)]
    whole, shard = ([*axes, (q, kv, 33, 1, 1, 0)] for q, kv in ((4096, 4096), (16, 48)))
    columns = [library.choose_tile(pointer(as_array(a, 2)), rows_are_keys, 64, 64, pointer(choice)) for a in (whole, shard)]
    if rows_are_keys:  # the keys of the halo are seen by some of the 16 queries only
        assert columns[1] <= 16 * 64
    else:
        assert columns[1] == pytest.approx(columns[0], rel=0.1)


def test_python_knows_the_size_of_the_workspace(library):
    rng = np.random.default_rng(1)
    for _ in range(200):
        axes, rank = random_problem(rng)
        axes = [(n, n, w - 1 + w % 2, min(s, w - 1 + w % 2), d, c) for n, _, w, s, d, c in axes]  # a bias needs odd windows
        kv_heads = int(rng.integers(1, 4))
        heads = kv_heads * int(rng.integers(1, 4))
        dim, dim_v, batch = 8 * int(rng.integers(1, 9)), 8 * int(rng.integers(1, 9)), int(rng.integers(1, 3))
        extra, has_bias = int(rng.choice([0, 1, 70, 300])), bool(rng.integers(2))
        expected = library.workspace_bytes(
            pointer(as_array(axes, rank, heads, kv_heads, dim, dim_v, extra, batch)), has_bias
        )
        used = axes[3 - rank :]
        spatial = tuple(axis[0] for axis in used)
        shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
        inputs = Inputs(
            shape(batch, *spatial, heads, dim),
            shape(batch, *spatial, kv_heads, dim),
            shape(batch, *spatial, kv_heads, dim_v),
            shape(heads, *(2 * axis[2] - 1 for axis in used)) if has_bias else None,
            shape(batch, extra, kv_heads, dim) if extra else None,
            shape(batch, extra, kv_heads, dim_v) if extra else None,
        )
        window, stride, dilation = ([axis[i] for axis in used] for i in (2, 3, 4))
        spec = make_spec(inputs.query, window, stride, dilation, False, None, None, None, None, False)
        assert _cuda.fused_workspace_bytes(spec, inputs) == expected
