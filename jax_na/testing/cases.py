"""Named problems that every implementation is tested on, and random ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_na._spec import Inputs, Spec, window_parameters


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Window parameters are scalars or one per axis; ``extra`` is the number of additional keys."""

    name: str
    spatial: tuple[int, ...]
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    dim: int = 32
    dim_v: int | None = None
    bias: bool = False
    extra: int = 0
    scale: float | None = None

    def spec(self, **changes: Any) -> Spec:
        window, stride, dilation, causal = window_parameters(
            self.spatial, self.window, self.stride, self.dilation, self.is_causal
        )
        scale = self.dim**-0.5 if self.scale is None else self.scale
        return dataclasses.replace(Spec(window, stride, dilation, causal, scale), **changes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        dim_v = self.dim if self.dim_v is None else self.dim_v
        shapes = {
            "query": (self.batch, *self.spatial, self.heads, self.dim),
            "key": (self.batch, *self.spatial, self.kv_heads, self.dim),
            "value": (self.batch, *self.spatial, self.kv_heads, dim_v),
        }
        if self.bias:
            shapes["bias"] = (self.heads, *(2 * w - 1 for w in self.spec().window))
        if self.extra:
            shapes["extra_key"] = (self.batch, self.extra, self.kv_heads, self.dim)
            shapes["extra_value"] = (self.batch, self.extra, self.kv_heads, dim_v)
        return shapes

    def inputs(self, dtype: Any, seed: int = 0) -> Inputs:
        """Normal random operands, numpy arrays rounded to ``dtype``."""
        rng = np.random.default_rng(seed)
        return Inputs(**{n: rng.standard_normal(s, np.float32).astype(jnp.dtype(dtype)) for n, s in self.shapes().items()})

    def cotangents(self, dtype: Any, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Full-size random cotangents of out and lse."""
        rng = np.random.default_rng(seed)
        shapes = self.shapes()
        out = rng.standard_normal((*shapes["query"][:-1], shapes["value"][-1]), np.float32)
        return out.astype(jnp.dtype(dtype)), rng.standard_normal(shapes["query"][:-1], np.float32)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``jax_na.neighborhood_attention`` besides the tensors."""
        return {
            "window_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
            "scale": self.scale,
        }


CASES = (
    # 1-D
    Case("1d", (65,), 7, batch=2),
    Case("1d-even", (50,), 8),
    Case("1d-window1", (33,), 1),
    Case("1d-full", (40,), 40),
    Case("1d-causal", (130,), 33, is_causal=True, heads=4, kv_heads=2),
    Case("1d-causal-stride", (97,), 10, stride=4, is_causal=True),
    Case("1d-stride", (101,), 9, stride=5),
    Case("1d-blocked", (70,), 8, stride=8),
    Case("1d-dilated", (67,), 6, dilation=3, bias=False),
    Case("1d-bias", (45,), 11, dilation=2, bias=True, batch=2),
    Case("1d-extra", (77,), 12, extra=9, heads=4, kv_heads=1, batch=2),
    Case("1d-long", (520,), 129, dim=64),
    # 2-D
    Case("2d", (14, 15), 7),
    Case("2d-nat", (14, 14), 7, batch=2, bias=True),
    Case("2d-even", (12, 17), (4, 6), batch=2),
    Case("2d-mqa-dv", (9, 13), (3, 5), heads=4, kv_heads=1, dim=16, dim_v=40),
    Case("2d-dilated", (19, 17), (5, 3), dilation=(3, 4)),
    Case("2d-dilated-tight", (14, 21), 7, dilation=(2, 3), bias=True),
    Case("2d-stride", (18, 20), (6, 7), stride=(2, 5)),
    Case("2d-stride-dilated-causal", (22, 19), (5, 4), stride=(2, 3), dilation=(2, 1), is_causal=(True, False)),
    Case("2d-causal", (13, 16), (5, 6), is_causal=True, heads=4, kv_heads=2),
    Case("2d-extra-bias", (11, 12), (5, 3), extra=5, bias=True, heads=2, kv_heads=1),
    Case("2d-d64", (33, 31), (13, 12), dim=64),
    Case("2d-d128", (24, 20), (10, 9), dim=128),
    # Key tiles of two shapes; see also 3-D.
    Case("2d-edge-d64", (31, 40), (20, 8), stride=(17, 1), dilation=(1, 2), dim=64, heads=1, kv_heads=1),
    Case("2d-edge-causal-d128", (23, 37), (17, 12), dilation=(1, 3), is_causal=(False, True), dim=128, heads=1, kv_heads=1),
    # Key boxes of 121 and 55 keys that all queries of a tile see, in tiles of 128 and 64.
    Case("2d-blocked-d64", (22, 33), 11, stride=11, dim=64),
    Case("2d-blocked-d128", (22, 33), 11, stride=11, dim=128),
    Case("2d-blocked-d256", (11, 22), 11, stride=11, dim=256, heads=1, kv_heads=1),
    Case("2d-d256", (9, 10), (5, 4), dim=256, heads=1, kv_heads=1),
    Case("2d-scale0", (8, 8), 3, scale=0.0),
    # 3-D
    Case("3d", (7, 8, 9), 3, batch=2),
    Case("3d-even", (6, 9, 8), (2, 4, 3)),
    Case("3d-dilated", (8, 9, 13), (2, 3, 3), dilation=(1, 2, 4), heads=4, kv_heads=2),
    Case("3d-causal-time", (9, 7, 8), (4, 3, 5), is_causal=(True, False, False), dim=64),
    Case("3d-stride", (10, 8, 12), (4, 5, 6), stride=(2, 1, 3)),
    Case("3d-bias-extra", (5, 6, 7), (3, 3, 5), bias=True, extra=3),
    Case("3d-odd-dim", (5, 6, 7), 3, dim=20, dim_v=12),
    Case("3d-edge-d128", (11, 10, 11), (6, 3, 7), stride=(2, 1, 1), dilation=(1, 3, 1), dim=128, heads=1, kv_heads=1),
    Case("3d-edge-d256", (8, 6, 5), (7, 4, 4), dim=256, heads=1, kv_heads=1),
    Case("3d-d128", (6, 12, 10), (3, 7, 5), dim=128, heads=1, kv_heads=1),
)

# A few of them cover most paths; the other dtypes and the slower checks run on these.
SHORT = tuple(
    case
    for case in CASES
    if case.name
    in (
        "1d-causal",
        "1d-extra",
        "2d-nat",
        "2d-stride-dilated-causal",
        "2d-mqa-dv",
        "2d-d128",
        "3d-causal-time",
        "3d-dilated",
    )
)


def random_case(seed: int, max_tokens: int = 600, bias: bool = True, extra: bool = True) -> Case:
    """A legal problem drawn from ``seed``: rank, odd sizes, window, stride, dilation, causality, GQA, bias, extra keys."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    limit = int(round(max_tokens ** (1 / rank)))
    spatial, window, stride, dilation = [], [], [], []
    for _ in range(rank):
        length = int(rng.integers(1, limit + 1))
        dil = int(rng.integers(1, min(length, 9) + 1)) if rng.random() < 0.4 else 1
        win = int(rng.integers(1, length // dil + 1))
        if rng.random() < 0.5:
            win = min(win, int(rng.integers(1, 9)))
        spatial.append(length)
        dilation.append(dil)
        window.append(win)
        stride.append(int(rng.integers(1, win + 1)) if rng.random() < 0.4 else 1)
    kv_heads = int(rng.choice([1, 2]))
    has_bias = bias and rng.random() < 0.25 and all(w % 2 for w in window)
    dim = int(rng.choice([8, 16, 32, 48, 64, 128]))
    return Case(
        f"random-{seed}",
        tuple(spatial),
        tuple(window),
        tuple(stride),
        tuple(dilation),
        tuple(bool(rng.random() < 0.25) for _ in range(rank)),
        batch=int(rng.integers(1, 3)),
        heads=kv_heads * int(rng.integers(1, 4)),
        kv_heads=kv_heads,
        dim=dim,
        dim_v=dim if rng.random() < 0.7 else int(rng.choice([8, 24, 32, 64])),
        bias=has_bias,
        extra=int(rng.integers(1, 20)) if extra and rng.random() < 0.2 else 0,
    )
