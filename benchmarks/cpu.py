"""XLA implementation on a CPU beside what users have without it: ``python -m benchmarks.cpu [--rows nat,2d,...]``.

Prints, per problem and implementation, milliseconds forward and forward + backward (median), and the memory the compiled
program needs besides its arguments (XLA's memory analysis: temporaries and outputs); ratios are those of the baseline
over ours, of the same run. Every implementation runs in its own process, and the implementations take turns for
``--rounds``: the median is over the calls of all rounds, so a slow minute of the machine falls on all of them.

A baseline may need ``--limit`` GiB for forward + backward, by the compiler's figure: three fifths of the machine's memory
unless given, so that its arguments and the system have room too. Dense masked attention that needs more is left out; the
gather is then timed on fewer tokens, and both times are those of the smaller problem, while its memory is that of the whole
one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import jax_na
from benchmarks import baselines

Array = Any
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    """``smaller`` is the first spatial axis on which baselines too big for this machine are timed."""

    shape: tuple[int, ...]
    window: tuple[int, ...]
    smaller: int


ROWS = {
    "nat": Row((2, 56, 56, 4, 32), (7, 7), 56),
    "2d": Row((1, 128, 128, 4, 64), (13, 13), 64),
    "3d": Row((1, 16, 32, 32, 4, 64), (5, 7, 7), 8),
    "1d": Row((1, 16384, 8, 64), (255,), 2048),
}


def ours(query: Array, key: Array, value: Array, window: tuple[int, ...]) -> Array:
    return jax_na.neighborhood_attention(query, key, value, window, implementation="xla")


FUNCTIONS = {"ours": ours, "gather": baselines.gather_attention, "dense": baselines.dense_attention}


def programs(implementation: str, shape: tuple[int, ...], window: tuple[int, ...]) -> tuple[Any, Any]:
    """Compiled forward and forward + backward (value and gradients for a full-size cotangent)."""
    function = FUNCTIONS[implementation]
    array = jax.ShapeDtypeStruct(shape, jnp.float32)

    def both(q: Array, k: Array, v: Array, g: Array) -> Any:
        out, vjp = jax.vjp(lambda *x: function(*x, window), q, k, v)
        return out, vjp(g)

    forward = jax.jit(lambda q, k, v: function(q, k, v, window))
    return forward.lower(array, array, array).compile(), jax.jit(both).lower(array, array, array, array).compile()


def memory(program: Any) -> int:
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def milliseconds(program: Any, arguments: list[Array], repeats: int) -> list[float]:
    """Of each call after the first."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


def measure(implementation: str, row: Row, first: int, repeats: int) -> dict[str, list[float]]:
    """Times on ``first`` of the tokens of the first axis, memory of the whole problem."""
    shape = (row.shape[0], first, *row.shape[2:])
    whole = programs(implementation, row.shape, row.window)
    timed = whole if shape == row.shape else programs(implementation, shape, row.window)
    arrays = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
    return {
        "fwd": milliseconds(timed[0], arrays[:3], repeats),
        "fwd+bwd": milliseconds(timed[1], arrays, repeats),
        "fwd MiB": [memory(whole[0]) / 2**20],
        "fwd+bwd MiB": [memory(whole[1]) / 2**20],
    }


def in_process(implementation: str, name: str, first: int, repeats: int) -> dict[str, list[float]]:
    """:func:`measure` in a process of its own: no allocator, thread pool or cache is shared."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--one", implementation, name, str(first), str(repeats)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def in_turns(implementations: dict[str, int], name: str, first: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each implementation over all rounds; ``implementations`` gives the calls of one round."""
    turns = [{i: in_process(i, name, first, calls) for i, calls in implementations.items()} for _ in range(rounds)]
    return {
        i: {key: statistics.median(value for turn in turns for value in turn[i][key]) for key in turns[0][i]}
        for i in implementations
    }


def report(name: str, limit: float, rounds: int) -> None:
    row = ROWS[name]
    print(f"{name}: {list(row.shape)}, window {'x'.join(map(str, row.window))}, float32", flush=True)
    fits = {i: memory(programs(i, row.shape, row.window)[1]) < limit * GIB for i in ("gather", "dense")}
    first = row.shape[1] if fits["gather"] else row.smaller
    implementations = {"ours": 5, "gather": 2} | ({"dense": 2} if fits["dense"] else {})
    results = in_turns(implementations, name, first, rounds)
    base = results["ours"]
    for implementation, result in results.items():
        cells = (f"{k} {v:9.1f} ({v / base[k]:5.1f}x)" for k, v in result.items())
        print(f"  {implementation:7s} " + "  ".join(cells), flush=True)
    if first != row.shape[1]:
        again = in_turns({"ours": 5}, name, row.shape[1], 1)["ours"]
        print(f"  times of the first {first} of {row.shape[1]}; all of them, ours: fwd {again['fwd']:.1f}, ", end="")
        print(f"fwd+bwd {again['fwd+bwd']:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help=f"comma-separated, of {', '.join(ROWS)}")
    limit = 0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    parser.add_argument("--limit", type=float, default=limit, help="GiB that a baseline may need (here %(default).1f)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the implementations take turns")
    parser.add_argument("--one", nargs=4, metavar=("IMPLEMENTATION", "ROW", "FIRST", "REPEATS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if arguments.one:
        implementation, name, first, repeats = arguments.one
        print(json.dumps(measure(implementation, ROWS[name], int(first), int(repeats))))
        return
    for name in arguments.rows.split(","):
        report(name, arguments.limit, arguments.rounds)


if __name__ == "__main__":
    main()
