"""Small problems that reach every kernel, both passes, for compute-sanitizer: python -m benchmarks.sanitizer_cases NAME..."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from benchmarks.measure import backward, forward
from jax_na import _backends
from jax_na.testing.cases import SHORT


def main(implementations: list[str]) -> None:
    ran = 0
    for implementation in implementations:
        for case in SHORT:
            for dtype in (jnp.bfloat16, jnp.float32):
                inputs = jax.tree.map(jnp.asarray, case.inputs(dtype))
                spec = case.spec(implementation=implementation)
                if _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", spec, inputs) is not None:
                    continue
                out, lse = forward(spec, inputs)
                grads = backward(spec, inputs, out, lse, jnp.asarray(case.cotangents(dtype)[0]))
                jax.block_until_ready((out, lse, grads))
                ran += 1
    print(f"all cases ran: {ran}")


if __name__ == "__main__":
    main(sys.argv[1:])
