"""Parameters and floating-point work of a model, counted without allocating it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def count_parameters(model: Any) -> int:
    """Numbers in the parameters of a model, a concrete one or one from ``nnx.eval_shape``."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _macs(eqn: Any) -> int:
    """Multiply-accumulates of one equation, without those of the jaxprs it calls."""
    name = eqn.primitive.name
    if name == "dot_general":
        (contract, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contract)
    if name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        kernel = eqn.invars[1].aval.shape
        taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return math.prod(eqn.outvars[0].aval.shape) * taps
    if name == "na_forward":
        query, _, value = (v.aval.shape for v in eqn.invars[:3])
        return math.prod(query[:-1]) * eqn.params["spec"].volume * (query[-1] + value[-1])
    return 0


def _walk(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        total += _macs(eqn)
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns"):
                    total += _walk(inner)
                elif hasattr(inner, "jaxpr"):
                    total += _walk(inner.jaxpr)
    return total


def count_macs(model: Any, *input_shapes: Sequence[int]) -> int:
    """Multiply-accumulates of one forward pass: convolutions, matrix products and attention (what papers call FLOPs).

    Args:
      model: a model, also an abstract one: ``nnx.eval_shape(lambda: create("nat_mini", rngs=nnx.Rngs(0)))``.
      input_shapes: of the inputs, batch included; they are float32.
    """
    graph, state = nnx.split(model)
    inputs = [jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in input_shapes]

    def run(state: Any, *inputs: Any) -> Any:
        model = nnx.merge(graph, state)
        model.eval()
        return model(*map(jnp.asarray, inputs))

    return _walk(jax.make_jaxpr(run)(state, *inputs).jaxpr)
