"""Small problems that reach every kernel, both passes, for compute-sanitizer: python -m benchmarks.sanitizer_cases NAME...

``--control`` instead makes one kernel read past the end of a buffer: a sanitizer that does not report it checks nothing.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import backward, forward
from jax_na import _backends, _primitives, _unfused
from jax_na._spec import Inputs, Spec
from jax_na.testing.cases import CASES, SHORT, Case

# Besides, Hopper's key tiles of two shapes.
CHECKED = (*SHORT, *(case for case in CASES if case.name in ("2d-edge-d64", "3d-edge-d128")))


def attention(spec: Spec, inputs: Inputs, grad_out: Any) -> Any:
    out, lse = forward(spec, inputs)
    return out, lse, backward(spec, inputs, out, lse, grad_out)


def products(spec: Spec, inputs: Inputs, grad_out: Any) -> Any:
    """The kernels of the unfused pair, without the softmax between them: that is XLA's."""
    halo = spec.identity_halo(inputs.query)
    weights = _unfused.pointwise(spec, inputs.query, inputs.key, halo)
    per_query = _unfused.neighborhood(spec, weights, inputs.value, halo)
    return per_query, _unfused.inverse(spec, weights, grad_out, halo, inputs.value.shape[-2 - spec.rank : -1])


def main(implementations: list[str]) -> None:
    ran, start = 0, time.time()
    for implementation in implementations:
        for case in CHECKED:
            for dtype in (jnp.bfloat16, jnp.float32):
                inputs = jax.tree.map(jnp.asarray, case.inputs(dtype))
                spec = case.spec(implementation=implementation)
                if _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", spec, inputs) is not None:
                    continue
                run = products if implementation in _unfused.STORES_WEIGHTS else attention
                jax.block_until_ready(run(spec, inputs, jnp.asarray(case.cotangents(dtype)[0])))
                ran += 1
                print(f"{time.time() - start:6.1f} s {implementation} {case.name} {jnp.dtype(dtype)}", flush=True)
    print(f"all cases ran: {ran}")


def read_past_the_end() -> None:
    """A halo operand that lies: the queries stand 700 tokens before the axis, so the bias is read 0.8 to 2.8 kB past its end."""
    case = Case("control", (501,), 501, heads=1, kv_heads=1, bias=True)
    inputs = jax.tree.map(jnp.asarray, case.inputs(jnp.float32))
    spec = case.spec(implementation="cuda_naive", sharded=True)
    jax.block_until_ready(_primitives.forward(spec, inputs, np.array([[-700, 0, 501]], np.int32)))


if __name__ == "__main__":
    if sys.argv[1:] == ["--control"]:
        read_past_the_end()
    else:
        main(sys.argv[1:])
