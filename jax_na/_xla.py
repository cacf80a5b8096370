"""The XLA implementation: runs on every platform JAX has. (First form: the definition; to be blocked over query tiles.)"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_na import _definition
from jax_na._spec import Inputs, Spec

Array = Any


def forward(spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``(out [*B, *Sq, H, Dv], lse [*B, *Sq, H])``."""
    return _definition.forward(spec, inputs, halo)


def backward(
    spec: Spec, inputs: Inputs, out: Array, lse: Array, grad_out: Array, grad_lse: Array | None, halo: Array
) -> Inputs:
    """Gradients of every given operand, by recomputation from lse."""
    return _definition.backward(spec, inputs, out, lse, grad_out, grad_lse, halo)


def tangent(spec: Spec, tangents: Inputs, inputs: Inputs, out: Array, lse: Array, halo: Array) -> tuple[Array, Array]:
    """Tangents of ``(out, lse)``: linear in ``tangents``."""
    del out, lse
    result = jax.jvp(lambda inputs: _definition.attention(spec, inputs, halo), (inputs,), (tangents,))[1]
    return jax.tree.map(jnp.asarray, result)
