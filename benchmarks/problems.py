"""The problems every GPU measurement is made on, their names, and the least time each could take.

Shapes are those of published models: HunyuanVideo, FLUX at 4K, Cosmos-Predict2, LTX, CogVideoX, NAT and DiNAT at 224 px.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np

from jax_na._window import group_length, window_bounds
from jax_na.testing.cases import Case


def _case(name, batch, spatial, heads, dim, window, dilation=1, stride=1, is_causal=False):
    return Case(name, spatial, window, stride, dilation, is_causal, batch, heads, heads, dim)


PROBLEMS = {
    case.name: case
    for case in (
        _case("1d-32k-w2k-d128", 1, (32768,), 24, 128, 2048),
        _case("1d-16k-w512-d64", 4, (16384,), 16, 64, 512),
        _case("2d-flux4k-d128", 1, (256, 256), 24, 128, 80),
        _case("2d-128-w32-d64", 4, (128, 128), 16, 64, 32),
        _case("2d-128-w32-dil4-d64", 4, (128, 128), 16, 64, 32, dilation=4),
        _case("3d-hunyuan-d128", 1, (30, 48, 80), 24, 128, (18, 24, 24)),
        _case("3d-cogvideo-d64", 1, (12, 30, 45), 48, 64, (8, 16, 16)),
        _case("2d-nat-s1-d32", 128, (56, 56), 2, 32, 7),
        _case("2d-nat-s1-dil8-d32", 128, (56, 56), 2, 32, 7, dilation=8),
        _case("2d-nat-s2-d32", 128, (28, 28), 4, 32, 7),
        _case("2d-nat-s3-d32", 128, (14, 14), 8, 32, 7),
        _case("2d-flux4k-gna-d128", 1, (256, 256), 24, 128, 80, stride=16),
        _case("3d-hunyuan-gna-d128", 1, (30, 48, 80), 24, 128, (18, 24, 24), stride=(16, 8, 8)),
        _case("3d-ltx-s5-d64", 1, (31, 136, 240), 4, 64, 11),
        _case("3d-ltx-s1-d64", 1, (16, 34, 60), 32, 64, (3, 7, 7)),
        _case("3d-cosmos-d128", 1, (24, 44, 80), 16, 128, (24, 12, 24)),
        _case("3d-cosmos-dil-d128", 1, (24, 44, 80), 16, 128, (24, 4, 16), dilation=(1, 11, 5)),
        # cuDNN's causal sliding window is the alternative a JAX user has here.
        _case("1d-causal-16k-w2k-d128", 1, (16384,), 16, 128, 2048, is_causal=True),
        _case("1d-causal-16k-w2k-d64", 1, (16384,), 32, 64, 2048, is_causal=True),
    )
}

# Rows the kernels were not tuned on: other sizes and windows, odd ones. Two beside each row above.
NEIGHBOURS = {
    case.name: case
    for case in (
        _case("1d-32k-w2k-d128:a", 1, (30011,), 24, 128, 1777),
        _case("1d-32k-w2k-d128:b", 1, (40000,), 20, 128, 1500),
        _case("1d-16k-w512-d64:a", 4, (15013,), 16, 64, 447),
        _case("1d-16k-w512-d64:b", 4, (20000,), 12, 64, 601),
        _case("2d-flux4k-d128:a", 1, (231, 250), 24, 128, (71, 90)),
        _case("2d-flux4k-d128:b", 1, (192, 320), 24, 128, (63, 101)),
        _case("2d-128-w32-d64:a", 4, (119, 131), 16, 64, (29, 37)),
        _case("2d-128-w32-d64:b", 4, (144, 112), 16, 64, (24, 41)),
        _case("2d-128-w32-dil4-d64:a", 4, (124, 132), 16, 64, (29, 33), dilation=4),
        _case("2d-128-w32-dil4-d64:b", 4, (160, 128), 16, 64, (27, 29), dilation=(5, 4)),
        _case("3d-hunyuan-d128:a", 1, (27, 45, 77), 24, 128, (15, 21, 27)),
        _case("3d-hunyuan-d128:b", 1, (33, 44, 80), 24, 128, (21, 17, 25)),
        _case("3d-cogvideo-d64:a", 1, (13, 29, 47), 48, 64, (7, 15, 19)),
        _case("3d-cogvideo-d64:b", 1, (10, 32, 48), 48, 64, (9, 13, 13)),
        _case("2d-nat-s1-d32:a", 128, (55, 57), 2, 32, 7),
        _case("2d-nat-s1-d32:b", 128, (48, 48), 3, 32, 9),
        _case("2d-nat-s1-dil8-d32:a", 128, (60, 62), 2, 32, 7, dilation=8),
        _case("2d-nat-s1-dil8-d32:b", 128, (63, 56), 2, 32, (7, 5), dilation=(9, 8)),
        _case("2d-nat-s2-d32:a", 128, (27, 29), 4, 32, 7),
        _case("2d-nat-s2-d32:b", 128, (32, 32), 4, 32, 5),
        _case("2d-nat-s3-d32:a", 128, (15, 13), 8, 32, 7),
        _case("2d-nat-s3-d32:b", 128, (16, 16), 8, 32, 5),
        _case("2d-flux4k-gna-d128:a", 1, (240, 272), 24, 128, (80, 64), stride=16),
        _case("2d-flux4k-gna-d128:b", 1, (250, 250), 24, 128, 75, stride=15),
        _case("3d-hunyuan-gna-d128:a", 1, (32, 48, 64), 24, 128, (16, 24, 32), stride=(16, 8, 8)),
        _case("3d-hunyuan-gna-d128:b", 1, (28, 42, 84), 24, 128, (14, 21, 28), stride=(14, 7, 7)),
        _case("3d-ltx-s5-d64:a", 1, (29, 131, 233), 4, 64, (9, 11, 13)),
        _case("3d-ltx-s5-d64:b", 1, (33, 128, 224), 4, 64, 9),
        _case("3d-ltx-s1-d64:a", 1, (15, 33, 61), 32, 64, (3, 5, 5)),
        _case("3d-ltx-s1-d64:b", 1, (17, 36, 57), 32, 64, (5, 7, 7)),
        _case("3d-cosmos-d128:a", 1, (24, 45, 77), 16, 128, (24, 13, 21)),
        _case("3d-cosmos-d128:b", 1, (21, 40, 84), 16, 128, (21, 14, 26)),
        _case("3d-cosmos-dil-d128:a", 1, (24, 40, 85), 16, 128, (24, 4, 17), dilation=(1, 10, 5)),
        _case("3d-cosmos-dil-d128:b", 1, (22, 44, 84), 16, 128, (22, 4, 12), dilation=(1, 11, 7)),
    )
}

# The best published kernels on one H200, bf16, (forward, backward) ms, as their users call them: NATTEN 0.21.7 (hopper-fna or
# cutlass-fna, best tile configuration), or PyTorch 2.11 FlexAttention, compiled, with the same mask.
BEST_PEER_MS = {
    "1d-32k-w2k-d128": (2.13, 6.52),
    "1d-16k-w512-d64": (1.02, 3.15),
    "2d-flux4k-d128": (17.5, 61.6),
    "2d-128-w32-d64": (2.16, 6.14),
    "2d-128-w32-dil4-d64": (1.2, 3.97),
    "3d-hunyuan-d128": (74.2, 259),
    "3d-cogvideo-d64": (4.41, 11.2),
    "2d-nat-s1-d32": (0.683, 2.73),
    "2d-nat-s1-dil8-d32": (0.277, 0.831),
    "2d-nat-s2-d32": (0.376, 1.37),
    "2d-nat-s3-d32": (0.232, 0.894),
    "2d-flux4k-gna-d128": (9.22, 49.7),
    "3d-hunyuan-gna-d128": (26.4, 138),
    "3d-ltx-s5-d64": (38.3, 93.4),
    "3d-ltx-s1-d64": (2.51, 6.93),
    "3d-cosmos-d128": (26.8, 90.6),
    "3d-cosmos-dil-d128": (2.68, 12.5),
}
# NATTEN 0.21.7 cutlass-fna (64x64 tiles): the kernels that run on any GPU from SM 8.0 up.
AMPERE_PEER_MS = {
    "1d-16k-w512-d64": (1.22, 4.00),
    "2d-128-w32-d64": (5.24, 18.0),
    "2d-128-w32-dil4-d64": (2.79, 11.5),
    "3d-cogvideo-d64": (13.9, 49.3),
    "2d-nat-s1-d32": (0.683, 4.28),
    "2d-nat-s1-dil8-d32": (0.277, 0.831),
    "2d-nat-s2-d32": (0.376, 2.45),
    "2d-nat-s3-d32": (0.232, 0.894),
    "3d-ltx-s5-d64": (71.6, 417.0),
    "3d-ltx-s1-d64": (5.51, 25.0),
}

# Dense attention through cuDNN on an H200, TFLOP/s (forward, backward) by head dim, and its copy rate in bytes per second.
DENSE_TFLOPS = {32: (248, 247), 64: (465, 451), 128: (617, 540)}
COPY_BYTES_PER_SECOND = 4.27e12


def useful_flop(case: Case, backward: bool) -> float:
    spec = case.spec()
    tokens = math.prod(case.spatial)
    keys: float = spec.volume
    if any(spec.is_causal):
        keys = 1.0
        for axis in range(spec.rank):
            _, counts = _window_counts(case, axis)
            keys *= float(np.mean(counts))
    return (10 if backward else 4) * case.batch * case.heads * tokens * keys * case.dim


def _window_counts(case: Case, axis: int) -> tuple[np.ndarray, np.ndarray]:
    spec, length = case.spec(), case.spatial[axis]
    x = np.arange(length)
    group = group_length(length, spec.dilation[axis], x % spec.dilation[axis], np)
    start, end = window_bounds(
        x // spec.dilation[axis], group, spec.window[axis], spec.stride[axis], spec.is_causal[axis], np
    )
    return start, end - start


@functools.cache
def _unions(length: int, window: int, stride: int, dilation: int, is_causal: bool, tile: int) -> int:
    """Sum over the tiles of one axis of the number of keys in the union of the tile's windows."""
    total = 0
    for group in range(dilation):
        size = int(group_length(length, dilation, group, np))
        i = np.arange(size)
        start, end = window_bounds(i, size, window, stride, is_causal, np)
        first = np.arange(0, size, tile)
        last = np.minimum(first + tile, size) - 1
        total += int(np.sum(end[last] - start[first]))
    return total


def visited_pairs(case: Case, tile: tuple[int, ...]) -> int:
    """Query-key pairs per batch entry and head that a kernel touches which takes query tiles of this shape (partial ones
    as whole) and reads exactly the union of their windows."""
    spec = case.spec()
    unions = 1
    for axis, length in enumerate(case.spatial):
        unions *= _unions(
            length, spec.window[axis], spec.stride[axis], spec.dilation[axis], spec.is_causal[axis], tile[axis]
        )
    return math.prod(tile) * unions


def bound_ms(case: Case, backward: bool) -> float:
    """Least time in milliseconds: the best tile of 64 or 128 queries at cuDNN's dense rate, or the memory bound."""
    powers = [1 << n for n in range(8)]
    tiles = [t for t in itertools.product(powers, repeat=len(case.spatial)) if math.prod(t) in (64, 128)]
    visited = min(visited_pairs(case, tile) for tile in tiles)
    rate = DENSE_TFLOPS[case.dim][backward] * 1e12
    flop = (10 if backward else 4) * case.batch * case.heads * visited * case.dim
    tensor_bytes = 2 * case.batch * math.prod(case.spatial) * case.heads * case.dim
    traffic = (8 if backward else 4) * tensor_bytes
    return 1e3 * max(flop / rate, traffic / COPY_BYTES_PER_SECOND)


if __name__ == "__main__":
    print(f"{'problem':24s} {'fwd bound ms':>12s} {'bwd bound ms':>12s}")
    for case in (*PROBLEMS.values(), *NEIGHBOURS.values()):
        print(f"{case.name:24s} {bound_ms(case, False):12.3f} {bound_ms(case, True):12.3f}")
