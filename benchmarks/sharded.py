"""Spatial sharding on several GPUs: numbers against the unsharded call, times, scaling efficiency, bytes of halo.

    python -m benchmarks.sharded [--devices 2 4] [--problems 3d-hunyuan-d128 3d-ltx-s5-d64] [--seconds 1] [--json FILE]
                                 [--options xla_gpu_use_memcpy_local_p2p=true]

For each problem the axis with the smallest halo is split. Times are medians of rounds of calls that are queued without waiting,
milliseconds per call. Efficiency is t(1 GPU) / (n * t(n GPUs)). Prints one JSON object; the exit status is 1 if numbers disagree.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_na
from benchmarks.problems import PROBLEMS
from jax_na._spatial import halo_widths
from jax_na.testing.cases import Case

SMOKE = Case("smoke", (4, 6, 16), (3, 3, 5), dim=16)
PERMUTE = re.compile(r"= (.*?) collective-permute(-start)?\(")
SHAPE = re.compile(r"\b(bf16|f16|u16|f32)\[([\d,]+)\]")


def widths(case: Case, axis: int, devices: int) -> tuple[int, int, int]:
    spec = case.spec()
    return halo_widths(
        case.spatial[axis], devices, spec.window[axis], spec.stride[axis], spec.dilation[axis], spec.is_causal[axis]
    )


def best_axis(case: Case, devices: int) -> int:
    """The axis whose extended tile is smallest against the block it serves."""

    def cost(axis: int) -> float:
        block, left, right = widths(case, axis, devices)
        return (block + left + right) * devices / case.spatial[axis]

    return min(range(len(case.spatial)), key=cost)


def permuted_bytes(compiled: Any) -> int:
    """Bytes a device receives through collective-permute, from the compiled program."""
    total = 0
    for shapes, is_async in PERMUTE.findall(compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in dims.split(",")])) * (4 if kind == "f32" else 2)
            for kind, dims in SHAPE.findall(shapes)
        ]
        total += sum(sizes) // (2 if is_async else 1)  # an asynchronous start names operands and results
    return total


def milliseconds(function: Any, *given: Any, budget: float) -> float:
    jax.block_until_ready(function(*given))
    start = time.perf_counter()
    jax.block_until_ready(function(*given))
    once = time.perf_counter() - start
    calls = max(3, min(20, int(budget / 5 / max(once, 1e-5))))
    rounds = []
    for _ in range(5 if once < budget / 5 else 1):
        start = time.perf_counter()
        results = [function(*given) for _ in range(calls)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / calls * 1e3)
        del results
    return float(np.median(rounds))


@jax.jit
def relative_error(a: Any, b: Any) -> Any:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def step(attend: Any) -> Any:
    """Forward and backward: the cotangent is an operand, so nothing but attention is timed."""

    def run(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(cotangent)

    return run


def measure(case: Case, device_counts: list[int], dtype: Any, budget: float, options: dict[str, str]) -> dict[str, Any]:
    devices = jax.devices()
    keys = jax.random.split(jax.random.key(0), 4)
    shape = case.shapes()["query"]
    with jax.default_device(devices[0]):
        given = tuple(jax.random.normal(key, shape, jnp.float32).astype(dtype) for key in keys)
    arguments = case.arguments()
    whole = functools.partial(jax_na.neighborhood_attention, **arguments)
    forward, both = jax.jit(whole), jax.jit(step(whole))
    out, grads = both(*given)
    report: dict[str, Any] = {
        "forward_ms": milliseconds(forward, *given[:3], budget=budget),
        "forward_backward_ms": milliseconds(both, *given, budget=budget),
        "sharded": {},
    }
    for count in device_counts:
        if count > len(devices):
            continue
        axis = best_axis(case, count)
        block, left, right = widths(case, axis, count)
        mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=devices[:count])
        partition = P(*(None,) * (1 + axis), "x")
        split = functools.partial(jax_na.sharded_neighborhood_attention, mesh=mesh, partition=partition, **arguments)
        even = case.spatial[axis] % count == 0
        placed = jax.device_put(given, NamedSharding(mesh, partition if even else P()))
        compiled = jax.jit(split).lower(*placed[:3]).compile(options)
        compiled_both = jax.jit(step(split)).lower(*placed).compile(options)
        sharded_out, sharded_grads = compiled_both(*placed)
        gathered = jax.device_put((sharded_out, *sharded_grads), devices[0])
        errors = [float(relative_error(a, b)) for a, b in zip(gathered, (out, *grads), strict=True)]
        exact = bool(jnp.array_equal(gathered[0], out))
        del gathered, sharded_out, sharded_grads
        row: dict[str, Any] = {
            "axis": axis,
            "block": block,
            "halo": [left, right],
            "even": even,
            "forward_ms": milliseconds(compiled, *placed[:3], budget=budget),
            "forward_backward_ms": milliseconds(compiled_both, *placed, budget=budget),
            "forward_bitwise_equal": exact,
            "relative_errors": dict(zip(("out", "grad_query", "grad_key", "grad_value"), errors, strict=True)),
            "halo_bytes_forward": permuted_bytes(compiled),
            "halo_bytes_forward_backward": permuted_bytes(compiled_both),
        }
        tokens = (left + right) * int(np.prod(case.spatial)) // case.spatial[axis]
        row["halo_bytes_expected"] = tokens * case.batch * case.kv_heads * 2 * case.dim * jnp.dtype(dtype).itemsize
        for name in ("forward", "forward_backward"):
            row[f"{name}_efficiency"] = report[f"{name}_ms"] / (count * row[f"{name}_ms"])
        report["sharded"][str(count)] = row
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--problems", nargs="+", default=["3d-hunyuan-d128", "3d-ltx-s5-d64"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each timing")
    parser.add_argument("--json", help="write the result there too")
    parser.add_argument("--options", nargs="*", default=[], help="compiler options of the sharded programs, name=value")
    parser.add_argument("--smoke", action="store_true", help="a tiny problem, on whatever devices there are")
    options = parser.parse_args()
    cases = [SMOKE] if options.smoke else [PROBLEMS[name] for name in options.problems]
    compiler_options = dict(option.split("=", 1) for option in options.options)
    result: dict[str, Any] = {
        "compiler_options": compiler_options,
        "device": jax.devices()[0].device_kind,
        "num_devices": len(jax.devices()),
        "jax": jax.__version__,
        "cuda": jax_na.cuda_status(),
        "problems": {},
    }
    failed = False
    for case in cases:
        try:
            dtype = jnp.float32 if options.smoke else jnp.bfloat16
            report = measure(case, options.devices, dtype, options.seconds, compiler_options)
            rows = report["sharded"].values()
            failed |= any(error > 0.02 for row in rows for error in row["relative_errors"].values())
            failed |= any(row["halo_bytes_forward"] != row["halo_bytes_expected"] for row in rows)
        except Exception as error:  # one problem must not hide the others
            report, failed = {"error": f"{type(error).__name__}: {error}"[:2000]}, True
        result["problems"][case.name] = report
        print(f"{case.name}: {json.dumps(report)}", file=sys.stderr, flush=True)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        with open(options.json, "w") as file:
            file.write(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
