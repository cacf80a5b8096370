"""Errors and tolerances: an implementation may err a few times as much as plain JAX does in the same precision."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_na import _definition
from jax_na._spec import Inputs, Spec
from jax_na.testing.compiled import QUICK

Array = Any


def relative_error(actual: Array, expected: Array) -> float:
    """``max |actual - expected| / max |expected|`` in float64; NaN anywhere gives infinity."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    both_empty = np.isneginf(actual) & np.isneginf(expected)
    difference = np.where(both_empty, 0.0, np.abs(np.where(both_empty, 0, actual) - np.where(both_empty, 0, expected)))
    if not np.all(np.isfinite(difference)):
        return float("inf")
    scale = np.max(np.abs(expected), where=np.isfinite(expected), initial=0.0)
    return float(difference.max(initial=0.0) / max(scale, 1e-3))


def same_precision(
    spec: Spec, inputs: Inputs, halo: Array, grad_out: Array, grad_lse: Array
) -> tuple[tuple[Array, Array], Inputs]:
    """The definition in the inputs' own precision, weights rounded to it: values and gradients."""
    plain = dataclasses.replace(spec, implementation=None)

    @functools.partial(jax.jit, compiler_options=QUICK if jax.default_backend() == "cpu" else None)
    def run(inputs: Inputs, grad_out: Array, grad_lse: Array) -> Any:
        values, vjp = jax.vjp(lambda x: _definition.attention(plain, x, halo, inputs.query.dtype), inputs)
        return values, vjp((grad_out, grad_lse.astype(values[1].dtype)))[0]

    return run(inputs, jnp.asarray(grad_out), jnp.asarray(grad_lse))


def tolerance(reference_error: float, dtype: Any) -> float:
    """Three times the same-precision error, and never below a few units in the last place."""
    return 3 * reference_error + 8 * float(jnp.finfo(dtype).eps)
