"""Random problems on a GPU against the numpy oracle, forward and all gradients, spread over processes.

Usage: python -m benchmarks.fuzz --implementation cuda_fused --count 1000 --workers 12
Prints one JSON line: {"implementation", "problems", "failed", "worst": {dtype: error}, "seconds": {part: mean per worker},
"failures": [...]}
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

# Largest error relative to the largest exact value. float32 is TF32 at JAX's default precision, float32* full precision. Where the
# exact value is a sum that cancels (the gradient of a small bias), what rounding the operands alone does is allowed four times.
LIMITS = {"float32": 4e-3, "float32*": 3e-5, "float16": 4e-3, "bfloat16": 2.5e-2}


# A problem runs once: what XLA tries out to make its own matrix products fast does not pay. One thread a worker.
WORKER_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
WORKER_XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

Row = tuple[int, str, float, str]


def round_to_tf32(array: Any) -> Any:
    """Round float32 to the 10 bits of mantissa that tensor cores read."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def check_range(implementation: str, seeds: range) -> tuple[list[Row], dict[str, float]]:
    """(seed, dtype, worst error or infinity, what) of each problem that the implementation serves, and seconds by part."""
    import jax
    from jax import lax

    from jax_na import _backends, _primitives
    from jax_na._spec import Inputs
    from jax_na.testing import oracle
    from jax_na.testing.cases import random_case
    from jax_na.testing.numerics import relative_error

    seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - start

    results: list[Row] = []
    for seed in seeds:
        kind = list(LIMITS)[seed % 4]
        case = random_case(seed, max_tokens=700)
        if implementation == "cuda_hopper":
            kind = ("float16", "bfloat16")[seed % 2]
            case = dataclasses.replace(case, dim=(32, 64, 128)[seed % 3], dim_v=None, bias=False, extra=0)
        precision = lax.Precision.HIGHEST if kind.endswith("*") else lax.Precision.DEFAULT
        spec = case.spec(implementation=implementation, precision=precision)
        inputs = case.inputs(kind.rstrip("*"))
        reason = _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", spec, inputs)
        if reason is not None:
            results.append((seed, "refused", 0.0, reason))
            continue
        grad_out, grad_lse = case.cotangents(kind.rstrip("*"))

        def run(inputs: Any, grad_out: Any, grad_lse: Any, spec: Any = spec) -> Any:
            halo = spec.identity_halo(inputs.query)
            values, vjp = jax.vjp(functools.partial(_primitives.forward, spec, halo=halo), inputs)
            return values, vjp((grad_out, grad_lse))[0]

        try:
            with timed("trace"):
                lowered = jax.jit(run).lower(inputs, grad_out, grad_lse)
            with timed("compile"):
                compiled = lowered.compile()
            with timed("run"):
                (out, lse), grads = jax.block_until_ready(compiled(inputs, grad_out, grad_lse))
            with timed("oracle"):
                truth = oracle.attention(case.spec(), inputs, None, grad_out, grad_lse)
            assert truth.grads is not None
            actual = {"out": out, "lse": lse, **grads._asdict()}
            expected = {"out": truth.out, "lse": truth.lse, **truth.grads._asdict()}
            errors = {n: relative_error(actual[n], expected[n]) for n in actual if expected[n] is not None}
            worst = max(errors, key=errors.__getitem__)
            if kind == "float32" and errors[worst] > LIMITS[kind]:
                rounded = Inputs(*(None if x is None else round_to_tf32(x) for x in inputs))
                plain = oracle.attention(case.spec(), rounded, None, round_to_tf32(grad_out), grad_lse)
                values = {"out": plain.out, "lse": plain.lse, **(plain.grads or truth.grads)._asdict()}
                allowed = {n: max(LIMITS[kind], 4 * relative_error(values[n], expected[n])) for n in errors}
                worst = max(errors, key=lambda n: errors[n] / allowed[n])
                errors[worst] *= LIMITS[kind] / allowed[worst]
            results.append((seed, kind, errors[worst], f"{worst} of {case}"))
        except Exception as error:
            results.append((seed, kind, float("inf"), f"{type(error).__name__}: {str(error)[:200]} in {case}"))
        if seed % 16 == 0:
            jax.clear_caches()
    return results, seconds


def take_gpu(counter: Any) -> None:
    """Workers take turns among the GPUs of a machine: JAX_NA_SPREAD_OVER_GPUS=4."""
    if "JAX_NA_SPREAD_OVER_GPUS" in os.environ:
        with counter.get_lock():
            counter.value += 1
            os.environ["CUDA_VISIBLE_DEVICES"] = str(counter.value % int(os.environ["JAX_NA_SPREAD_OVER_GPUS"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", default="cuda")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    arguments = parser.parse_args()
    chunks = [
        range(arguments.first + i, arguments.first + arguments.count, arguments.workers * 4)
        for i in range(arguments.workers * 4)
    ]
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {WORKER_XLA_FLAGS}".strip()}
    os.environ.update({name: os.environ.get(name, value) for name, value in WORKER_ENVIRONMENT.items()} | flags)
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        arguments.workers, mp_context=context, initializer=take_gpu, initargs=(context.Value("i", 0),)
    ) as pool:
        parts = list(pool.map(functools.partial(check_range, arguments.implementation), chunks))
    wall = time.perf_counter() - start
    results = [row for rows, _ in parts for row in rows]
    by_part = {name: sum(seconds[name] for _, seconds in parts) / arguments.workers for name in parts[0][1]}
    served = [row for row in results if row[1] != "refused"]
    failures = [row for row in served if not row[2] <= LIMITS[row[1]]]
    worst = {kind: max((row[2] for row in served if row[1] == kind), default=float(np.nan)) for kind in LIMITS}
    print(
        json.dumps(
            {
                "implementation": arguments.implementation,
                "problems": len(served),
                "refused": len(results) - len(served),
                "failed": len(failures),
                "worst": {kind: float(f"{error:.3g}") for kind, error in worst.items() if error == error},
                "seconds": {name: round(spent, 1) for name, spent in {"wall": wall, **by_part}.items()},
                "failures": [list(map(str, row)) for row in failures[:10]],
            }
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
