"""Tolerances here are those of float32 products; GPUs would use fewer bits by default. And models without their initializers."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from flax_layers._random_state import concrete_random_state


@pytest.fixture(autouse=True)
def short_errors(monkeypatch):
    """Flax asks the counter of a random stream for its sharding on every draw. While JAX traces, that raises an AttributeError
    whose message, which nobody sees, lists operations traced so far: nine tenths of the time of ``nnx.eval_shape``."""
    monkeypatch.setattr("jax._src.interpreters.partial_eval.DynamicJaxprTracer._origin_msg", lambda self: "", raising=False)


@pytest.fixture(autouse=True)
def full_precision(quick_compilation):
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def built() -> Callable[[Callable[[], Any]], Any]:
    """``built(make)``: the module of ``make()`` with every parameter random, drawn by numpy.

    JAX compiles a program for each shape that an initializer draws, which takes longer than most of what a test then does.
    Norms get scales around 1; nothing is left at the zeros and ones that training starts from.
    """

    def build(make: Callable[[], Any]) -> Any:
        graph, params, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
        rng = np.random.default_rng(0)

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            fan_in = max(int(np.prod(leaf.shape[:-1])), 16)
            values = rng.standard_normal(leaf.shape) / np.sqrt(fan_in) + ("'scale'" in jax.tree_util.keystr(path))
            return jax.device_put(values.astype(leaf.dtype))

        return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, params), concrete_random_state(rest, 0))

    return build
