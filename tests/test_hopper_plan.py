"""The tile plan and the geometry of the Hopper kernels: what the kernels rely on, checked on the host."""

import ctypes
import math
import random

import numpy as np
import pytest

from jax_na._spatial import halo_widths
from jax_na._window import window_bounds
from jax_na.testing.cases import CASES

PLAN = 14  # entries of what `plan_ctas` fills


@pytest.fixture(scope="module")
def library(compile_library):
    loaded = compile_library("tests/hopper_plan.cpp", "cuda/fused/plan_sm90.cc", "cuda/fused/balance_sm90.cc")
    loaded.plan_shard.restype = ctypes.c_double
    for name in ("check_plan", "check_backward_plan", "check_group_axis", "check_fast_divisor", "check_mask_codes"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def plan_error(library, axes, dim, heads=2):
    flat = [value for axis in axes for value in axis]
    arguments = (ctypes.c_int32 * len(flat))(*flat), len(axes), dim, heads
    backward = library.check_backward_plan(*arguments).decode() if dim <= 128 else ""
    return library.check_plan(*arguments).decode() + backward


def test_group_axis(library):
    assert library.check_group_axis() == b""


def test_fast_divisor(library):
    assert library.check_fast_divisor() == b""


def test_mask_codes(library):
    assert library.check_mask_codes(2000) == b""


@pytest.mark.parametrize(
    ("axes", "dim"),
    [
        ([(32768, 2048, 1, 1, 0)], 128),
        ([(256, 80, 16, 1, 0), (256, 80, 16, 1, 0)], 128),
        ([(250, 75, 15, 1, 0), (250, 75, 15, 1, 0)], 128),
        ([(56, 7, 1, 1, 0), (56, 7, 1, 1, 0)], 32),
        ([(56, 7, 1, 8, 0), (56, 7, 1, 8, 0)], 32),
        ([(28, 7, 1, 1, 0), (28, 7, 1, 1, 0)], 32),
        ([(14, 7, 1, 1, 0), (14, 7, 1, 1, 0)], 32),
        ([(16, 3, 1, 1, 0), (34, 7, 1, 1, 0), (60, 7, 1, 1, 0)], 64),
        ([(31, 11, 1, 1, 0), (136, 11, 1, 1, 0), (240, 11, 1, 1, 0)], 64),
        ([(24, 24, 1, 1, 0), (44, 4, 1, 11, 0), (80, 16, 1, 5, 0)], 128),
        ([(16384, 2048, 1, 1, 1)], 64),
    ],
)
def test_plans_of_the_benchmark(library, axes, dim):
    assert plan_error(library, axes, dim) == ""


def test_plans_of_random_problems(library):
    choose = random.Random(0)
    for _ in range(150):
        rank = choose.choice([1, 2, 3])
        axes = []
        for _ in range(rank):
            length = choose.randint(1, {1: 2000, 2: 70, 3: 18}[rank])
            dilation = choose.choice([1, 1, choose.randint(1, min(8, length))])
            largest = length // dilation
            window = choose.choice([choose.randint(1, largest), min(largest, 7)])
            axes.append((length, window, choose.randint(1, window), dilation, choose.choice([0, 0, 1])))
        dim = choose.choice([32, 64, 128, 256])
        assert plan_error(library, axes, dim) == "", (axes, dim)


def key_tiles(plan, axis, begin, end):
    """From where to where the key tiles of either shape lie on one axis, of a query tile with these keys."""
    box, edge_box, edge_axis = int(plan[6 + axis]), int(plan[9 + axis]), int(plan[12])
    starts = list(range(begin, end, box))
    if axis == edge_axis and end - starts[-1] <= edge_box:
        edges = [starts.pop()]
    else:
        edges = [] if edge_axis in (-1, axis) else list(range(begin, end, edge_box))
    return [(a, a + box) for a in starts], [(a, a + edge_box) for a in edges]


@pytest.mark.parametrize(
    ("lengths", "windows", "strides", "causal", "dim"),
    [
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), False, 128),
        ((31, 136, 240), (11, 11, 11), (1, 1, 1), False, 64),
        ((40, 64), (9, 12), (1, 4), False, 128),
        ((64, 512), (8, 40), (1, 1), True, 128),
    ],
)
def test_the_plan_of_a_shard_counts_what_a_middle_shard_visits(library, lengths, windows, strides, causal, dim):
    """The last axis split over four devices: windows of the second shard do not stick at an edge, so none may be costed so."""
    widths = [(n, 0, 0) for n in lengths[:-1]]
    widths.append(halo_widths(lengths[-1], 4, windows[-1], strides[-1], 1, causal))
    axes = [
        (block, left + block + right, window, stride, 1, int(causal))
        for (block, left, right), window, stride in zip(widths, windows, strides, strict=True)
    ]
    flat = [value for axis in axes for value in axis]
    plan = np.zeros(PLAN, np.int32)
    pointer = plan.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    counted = library.plan_shard((ctypes.c_int32 * len(flat))(*flat), len(axes), dim, pointer)
    visits = [1, 1]  # of key tiles of either shape
    for axis, (length, window, stride) in enumerate(zip(lengths, windows, strides, strict=True), 3 - len(lengths)):
        unit, grid = (int(plan[i + axis]) for i in (0, 3))
        block = widths[axis - 3][0]
        query = np.arange(block) + (block if block < length else 0)
        begin, end = window_bounds(query, length, window, stride, causal, np)
        on_axis = [0, 0]
        for first in range(0, block, unit * grid):
            union_end = end[min(first + unit * grid, block) - 1]
            for start in range(first, min(first + unit * grid, block), unit):
                last = min(start + unit, block) - 1
                for shape, tiles in enumerate(key_tiles(plan, axis, begin[first], union_end)):
                    on_axis[shape] += sum(a < end[last] and b > begin[start] for a, b in tiles)
        visits = [n * more for n, more in zip(visits, on_axis, strict=True)]
    assert counted == pytest.approx(sum(visits), rel=1e-6)


@pytest.mark.parametrize(
    ("lengths", "windows", "heads", "dim", "gain"),
    [
        ((12, 30, 45), (8, 16, 16), 48, 64, 0),
        ((13, 29, 47), (7, 15, 19), 48, 64, 0.1),  # 168 tiles for 132 CTAs: a CTA would come to 14 of them
        ((27, 45, 77), (15, 21, 27), 24, 128, 0.05),
        ((128, 128), (32, 32), 64, 64, 0),
    ],
)
def test_ctas_end_together(library, lengths, windows, heads, dim, gain):
    """The fullest CTA has little more to do than the average, or no few CTAs less would be better."""
    axes = [value for length, window in zip(lengths, windows, strict=True) for value in (length, window, 1, 1, 0)]
    plan = np.zeros(PLAN, np.int32)
    pointer = plan.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    ctas = library.plan_ctas((ctypes.c_int32 * len(axes))(*axes), len(lengths), dim, heads, pointer)
    visits = np.ones((2, 3, 1))  # of a consumer at a tile, to key tiles of either shape
    for axis, (length, window) in enumerate(zip(lengths, windows, strict=True), 3 - len(lengths)):
        unit, grid = (int(plan[i + axis]) for i in (0, 3))
        begin, end = window_bounds(np.arange(length), length, window, 1, False, np)
        first = np.arange(0, length, unit * grid)
        on_axis = np.zeros((2, 3, len(first)))
        for tile, start in enumerate(first):
            tiles = key_tiles(plan, axis, begin[start], end[min(start + unit * grid, length) - 1])
            for w in range(3):
                mine = start + (w * unit if grid > 1 else 0)
                if mine >= min(start + unit * grid, length):
                    continue
                low, high = begin[mine], end[min(mine + unit, length) - 1]
                on_axis[:, w, tile] = [sum(a < high and b > low for a, b in boxes) for boxes in tiles]
        visits = (visits[:, :, :, None] * on_axis[:, :, None, :]).reshape(2, 3, -1)
    times = np.tile(visits.sum(0).max(0) * (plan[13] + 16) + 100, heads)

    def fullest(number):
        return np.bincount(np.arange(times.size) % number, weights=times).max()

    assert 128 <= ctas <= 132
    if ctas < 132:
        assert fullest(ctas) < 0.99 * fullest(132)
    for number in range(128, 132):
        assert fullest(ctas) <= fullest(number) / 0.99
    assert fullest(ctas) <= (1 - gain) * fullest(132)


@pytest.mark.parametrize("name", ["2d-edge-d64", "2d-edge-causal-d128", "3d-edge-d128", "3d-edge-d256"])
def test_key_tiles_of_two_shapes(library, name):
    """The cases of this name have them."""
    case = next(case for case in CASES if case.name == name)
    spec = case.spec()
    columns = zip(case.spatial, spec.window, spec.stride, spec.dilation, spec.is_causal, strict=True)
    axes = [int(x) for column in columns for x in column]
    plan = np.zeros(PLAN, np.int32)
    pointer = plan.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    library.plan_ctas((ctypes.c_int32 * len(axes))(*axes), len(case.spatial), case.dim, case.heads, pointer)
    assert plan[12] >= 0


@pytest.mark.parametrize(
    ("lengths", "windows", "causal", "heads", "dim", "some"),
    [
        ((16384,), (2048,), (True,), 16, 128, True),
        ((3000,), (700,), (True,), 3, 64, True),
        ((3000,), (3000,), (True,), 2, 64, True),  # all are short
        ((24, 32, 48), (12, 16, 16), (True, False, False), 2, 128, True),
        ((24, 40, 64), (12, 20, 20), (True, False, False), 24, 128, True),  # a layer of three heads is at work at a time
        ((100, 90), (30, 30), (False, True), 2, 64, False),  # the axis of the causal mask varies fastest
        ((3000,), (700,), (False,), 3, 64, False),
        ((32768,), (8192,), (True,), 64, 128, False),  # windows of all heads at a time would leave L2
    ],
)
def test_short_tiles_come_last(library, lengths, windows, causal, heads, dim, some):
    triples = zip(lengths, windows, causal, strict=True)
    axes = [x for length, window, flag in triples for x in (length, window, 1, 1, int(flag))]
    arguments = (ctypes.c_int32 * len(axes))(*axes), len(lengths), dim, heads
    plan, pointer = np.zeros(PLAN, np.int32), ctypes.POINTER(ctypes.c_int32)
    library.plan_ctas(*arguments, plan.ctypes.data_as(pointer))
    extents = (plan[:3] * plan[3:6])[3 - len(lengths) :]
    tiles = [int(-(-length // extent)) for length, extent in zip(lengths, extents, strict=True)]
    tiles_of_layer = math.prod(tiles[1:])
    items = np.zeros(heads * math.prod(tiles), np.int32)
    short_layers = library.plan_schedule(*arguments, math.prod(tiles), items.ctypes.data_as(pointer))
    assert sorted(items) == list(range(items.size))
    assert (short_layers > 0) == some
    if not some:
        np.testing.assert_array_equal(items, np.arange(items.size))
        return

    begin, end = window_bounds(np.arange(lengths[0]), lengths[0], windows[0], 1, True, np)
    first = np.arange(0, lengths[0], extents[0])
    last = np.minimum(first + extents[0], lengths[0]) - 1
    layer = items % math.prod(tiles) // tiles_of_layer
    is_short = begin[first][layer] == 0
    assert is_short.sum() == short_layers * heads * tiles_of_layer
    assert np.all(np.diff(is_short.astype(int)) >= 0)
    assert np.all(np.diff(items[~is_short]) > 0)
    assert np.all(np.diff((end[last] - begin[first])[layer[is_short]]) <= 0)  # the longest first
    steps = np.diff(items[is_short])
    assert np.mean(steps == 1) >= 1 - 1 / tiles_of_layer  # a layer at a time
