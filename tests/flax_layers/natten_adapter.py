"""A stand-in for the ``natten`` package, for PyTorch models written by others: its operations by our definition."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_na import _definition
from jax_na._spec import Spec


def _spec(kernel_size: int, dilation: int) -> Spec:
    return Spec((kernel_size,) * 2, (1, 1), (dilation,) * 2, (False, False), 1.0)


def _mask(spatial: tuple[int, int], kernel_size: int, dilation: int) -> np.ndarray:
    """``[queries, keys]``: every row has ``kernel_size ** 2`` keys, in row-major order."""
    halo = np.array([(0, 0, length) for length in spatial], np.int32)
    seen = _definition.mask(_spec(kernel_size, dilation), spatial, spatial, halo)
    return np.array(seen).reshape(spatial[0] * spatial[1], -1)


def natten2dqkrpb(query: Any, key: Any, rpb: Any, kernel_size: int, dilation: int) -> Any:
    """``query, key [B, H, h, w, D]`` to scores ``[B, H, h, w, kernel_size ** 2]``."""
    import torch

    batch, heads, *spatial, _ = query.shape
    halo = np.array([(0, 0, length) for length in spatial], np.int32)
    bias = _definition.relative_bias(
        _spec(kernel_size, dilation), jnp.asarray(rpb.detach().numpy()), tuple(spatial), tuple(spatial), halo
    )
    scores = query.flatten(2, 3) @ key.flatten(2, 3).transpose(-1, -2)
    scores = scores + torch.from_numpy(np.array(bias)).reshape(heads, *scores.shape[-2:])
    seen = torch.from_numpy(_mask(tuple(spatial), kernel_size, dilation))
    return scores[:, :, seen].reshape(batch, heads, *spatial, kernel_size**2)


def natten2dav(weights: Any, value: Any, kernel_size: int, dilation: int) -> Any:
    """``weights [B, H, h, w, kernel_size ** 2]`` and ``value [B, H, h, w, D]`` to ``[B, H, h, w, D]``."""
    import torch

    batch, heads, *spatial, _ = value.shape
    seen = torch.from_numpy(_mask(tuple(spatial), kernel_size, dilation))
    dense = torch.zeros(batch, heads, *seen.shape)
    dense[:, :, seen] = weights.reshape(batch, heads, -1)
    return (dense @ value.flatten(2, 3)).reshape(value.shape)


def install() -> None:
    """Make ``from natten.functional import ...`` find this module."""
    package, functional = types.ModuleType("natten"), types.ModuleType("natten.functional")
    for module in (package, functional):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    functional.natten2dqkrpb, functional.natten2dav = natten2dqkrpb, natten2dav  # type: ignore[attr-defined]
    package.functional = functional  # type: ignore[attr-defined]
    sys.modules |= {"natten": package, "natten.functional": functional}
