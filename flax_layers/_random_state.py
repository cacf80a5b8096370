"""The state of a model that is no parameter: random streams of its dropouts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def concrete_random_state(rest: Any, seed: int = 0) -> Any:
    """Concrete leaves for those that ``nnx.eval_shape`` left abstract: a key of its own per stream, counts of zero."""
    leaves, tree = jax.tree.flatten(rest)

    def fill(index: int, leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key = jax.random.fold_in(jax.random.key(seed), index)
            return jnp.broadcast_to(key, leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.unflatten(tree, [fill(i, leaf) for i, leaf in enumerate(leaves)])
