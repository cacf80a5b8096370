"""The whole round on a GPU: tests, random problems, sanitizer, benchmark rows; writes one JSON file that is committed.

Usage: python -m benchmarks.gpu_round --out benchmarks/results/h200/latest.json [--commit HASH] [--skip tests fuzz sanitizer rows]
  [--implementations cuda cuda_fused ... cudnn] [--problems REGEX] [--dtypes bfloat16 float32] [--limit SECONDS]

The file is written anew after every part. Exit status 1 if a test failed or was skipped, a random problem was wrong, the sanitizer
found an error, or a part did not end within its limit.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.problems import NEIGHBOURS, PROBLEMS, bound_ms, useful_flop

# Rough multiples of the bound, to choose how many calls one measurement takes; and the implementations that are measured only where
# the window is small enough for their time (direct) or their memory (weights of the unfused pair).
EXPECTED_OVER_BOUND = {
    "cuda": 1.5,
    "cuda_hopper": 1.5,
    "cudnn": 1.5,
    "cuda_fused": 3.0,
    "cuda_gemm": 12.0,
    "cuda_naive": 70.0,
    "xla": 70.0,
}
SMALL_WINDOWS_ONLY = ("cuda_gemm", "cuda_naive", "xla")
LARGEST_SMALL_WINDOW = 1024
FUZZED = ("cuda_fused", "cuda_hopper", "cuda_gemm")
UNCHECKED = ("cuda", "cudnn")  # by the sanitizer: one of the others, and a peer

ROOT = pathlib.Path(__file__).resolve().parent.parent


# Side by side, since a worker that compiles a model for minutes keeps the tests that were dealt to it waiting.
TEST_PARTS = {
    "models": ["tests/flax_layers"],
    "kernels": ["tests", "--ignore=tests/flax_layers"],
}


def run_tests(arguments: list[str], limit: float | None) -> dict[str, Any]:
    """The `gpu` tests, none of which may be skipped."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda name: run_test_part(name, arguments, limit), TEST_PARTS))
    total = {key: sum(part[key] for part in parts) for key in ("passed", "failed", "skipped")}
    return total | {"failures": [name for part in parts for name in part["failures"]]}


def run_test_part(name: str, arguments: list[str], limit: float | None) -> dict[str, Any]:
    report = pathlib.Path(f"gpu_tests_{name}.xml").resolve()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu or sm90", f"--junitxml={report}", *TEST_PARTS[name]]
    if importlib.util.find_spec("xdist"):  # compilation by XLA is most of the time
        workers = 3 if name == "models" else max(1, (os.cpu_count() or 4) * 5 // 8)
        command += ["-n", str(workers), "--dist", "loadgroup"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, timeout=limit)
    import xml.etree.ElementTree as ElementTree

    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = number["tests"] - failed - number["skipped"]
    return {"passed": passed, "failed": failed, "skipped": number["skipped"], "failures": names}


def run_fuzz(name: str, count: int, limit: float | None) -> dict[str, Any]:
    """``count`` random problems of an implementation against the numpy oracle: benchmarks/fuzz.py."""
    workers = str(max(1, (os.cpu_count() or 4) // 8))
    command = [
        sys.executable,
        "-m",
        "benchmarks.fuzz",
        "--implementation",
        name,
        "--count",
        str(count),
        "--workers",
        workers,
    ]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=limit)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": count, "failures": [process.stderr[-1500:]]}


def sanitize(limit: float | None, tool: str, *cases: str) -> tuple[int, str]:
    """Exit status (9: the tool found errors; 124: it did not end) and output of the cases under a tool of compute-sanitizer.

    An access past the end of a buffer is seen only if the buffer is an allocation of its own, so not in XLA's default pool; a
    control shows that it is seen with this allocator. Without the filter XLA's own kernels are checked too.
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": flags,
    }
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=jax_na"]
    command += [sys.executable, "-m", "benchmarks.sanitizer_cases", *cases]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=limit)
    except subprocess.TimeoutExpired as error:
        return 124, (error.stdout or b"").decode()[-500:] + f"did not end within {limit:.0f} s"
    return process.returncode, process.stdout + process.stderr


def run_sanitizer(implementations: list[str], limit: float | None) -> dict[str, Any]:
    """compute-sanitizer memcheck and racecheck over benchmarks/sanitizer_cases.py; besides, memcheck over a known error."""
    kinds = [(tool, name) for tool in ("memcheck", "racecheck") for name in implementations if name not in UNCHECKED]

    def run(tool: str, name: str) -> dict[str, Any]:
        start = time.time()
        status, text = sanitize(limit, tool, name)
        found = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", text)
        ran = re.findall(r"all cases ran: (\d+)", text)
        clean = status == 0 and bool(ran)
        print(f"{tool} {name}: {found} {ran} {time.time() - start:.0f} s", "" if clean else text[-3000:], flush=True)
        return {"clean": clean, "cases": int(ran[0]) if ran else None, "summary": found[-1] if found else text[-500:]}

    # Of nine beside each other on one GPU, one did not end in some rounds.
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        control = pool.submit(sanitize, limit, "memcheck", "--control")
        outcomes = list(pool.map(lambda kind: run(*kind), kinds))
    seen = "Invalid __global__ read" in control.result()[1]
    if not seen:
        print("the control's error was not found:", control.result()[1][-2000:])
    return {"control": {"clean": seen}} | {f"{tool} {name}": x for (tool, name), x in zip(kinds, outcomes, strict=True)}


def run_rows(
    implementations: list[str],
    problems: str,
    dtypes: list[str],
    neighbours: bool,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Time every problem; ``keep`` is handed the rows so far after each, so that a round cut short loses only its last problem."""
    import jax.numpy as jnp

    from benchmarks.measure import input_sets, time_case

    # Neighbours right behind their row, to be compared with it: the cards of one host differ by several percent.
    cases = {}
    for name, case in PROBLEMS.items():
        cases[name] = case
        cases |= {other: NEIGHBOURS[other] for other in NEIGHBOURS if neighbours and other.startswith(f"{name}:")}
    rows = []
    print(
        f"{'problem':26s} {'dtype':9s} {'implementation':15s} pass {'ms':>9s} {'TFLOP/s':>8s} {'x bound':>8s} {'error':>8s}"
    )
    for name, case in cases.items():
        if not re.search(problems, name):
            continue
        small = case.spec().volume <= LARGEST_SMALL_WINDOW
        served = [x for x in implementations if small or x not in SMALL_WINDOWS_ONLY]
        for dtype in dtypes:
            sets = input_sets(case, jnp.dtype(dtype))
            for implementation in served:
                expected = EXPECTED_OVER_BOUND.get(implementation, 10.0)
                try:
                    times = time_case(case, sets, implementation, expected * bound_ms(case, False))
                except NotImplementedError as reason:
                    print(f"{name:26s} {dtype:9s} {implementation:15s} {str(reason)[:90]}")
                    continue
                except Exception:
                    traceback.print_exc(limit=3)
                    continue
                for which, value in times.items():
                    tflops = useful_flop(case, which == "bwd") / value["ms"] * 1e-9
                    bound = bound_ms(case, which == "bwd")
                    rows.append(
                        {
                            "problem": name,
                            "dtype": dtype,
                            "implementation": implementation,
                            "pass": which,
                            "ms": round(value["ms"], 5),
                            "useful_tflops": round(tflops, 2),
                            "bound_ms": round(bound, 4),
                            "max_error": float(f"{value['max_error']:.3g}"),
                        }
                    )
                    print(
                        f"{name:26s} {dtype:9s} {implementation:15s} {which}  {value['ms']:9.4f} {tflops:8.1f} "
                        f"{value['ms'] / bound:8.2f} {value['max_error']:8.1e}",
                        flush=True,
                    )
            keep(rows)


def versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "jax_na", "flax", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source tree"
    found["python"] = sys.version.split()[0]
    return found


def gpu_name() -> dict[str, str]:
    query = "name,driver_version,memory.total"
    text = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
    return dict(zip(query.split(","), (x.strip() for x in text.stdout.splitlines()[0].split(",")), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--skip", nargs="*", default=[], choices=["tests", "fuzz", "sanitizer", "rows"])
    parser.add_argument(
        "--implementations", nargs="*", default=["cuda", "cuda_fused", "cuda_hopper", "cuda_gemm", "cuda_naive"]
    )
    parser.add_argument("--fuzz", type=int, default=1000, help="random problems per implementation")
    parser.add_argument("--problems", default=".")
    parser.add_argument("--neighbours", action="store_true")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--pytest", nargs="*", default=[])
    parser.add_argument("--limit", type=float, default=None, help="seconds that tests, fuzz and sanitizer may each take")
    arguments = parser.parse_args()
    commit = (
        arguments.commit
        or subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    )
    out = pathlib.Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    result |= {"commit": commit, "versions": versions(), "gpu": gpu_name()}

    def save() -> None:
        out.write_text(json.dumps(result, indent=1) + "\n")

    # Compilation is most of their time, so the checks run side by side; the rows have the machine to themselves.
    checks: dict[tuple[str, ...], Callable[[], Any]] = {
        ("tests",): functools.partial(run_tests, arguments.pytest, arguments.limit),
        ("sanitizer",): functools.partial(run_sanitizer, arguments.implementations, arguments.limit),
    }
    for name in arguments.implementations:
        if name in FUZZED:
            checks["fuzz", name] = functools.partial(run_fuzz, name, arguments.fuzz, arguments.limit)
    unfinished = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = {pool.submit(check): key for key, check in checks.items() if key[0] not in arguments.skip}
        for outcome in concurrent.futures.as_completed(running):
            key = running[outcome]
            try:
                found = outcome.result()
            except subprocess.TimeoutExpired:
                unfinished.append(" ".join(key))
                continue
            (result.setdefault("fuzz", {}) if key[0] == "fuzz" else result)[key[-1]] = found | {"commit": commit}
            print(f"{' '.join(key)}:", found, flush=True)
            save()
    result["unfinished"] = unfinished
    save()
    if "rows" not in arguments.skip:
        before = result.get("rows", [])

        def keep(rows: list[dict[str, Any]]) -> None:
            measured = {(r["problem"], r["dtype"], r["implementation"]) for r in rows}
            kept = [r for r in before if (r["problem"], r["dtype"], r["implementation"]) not in measured]
            result["rows"] = kept + [row | {"commit": commit} for row in rows]
            save()

        run_rows(arguments.implementations, arguments.problems, arguments.dtypes, arguments.neighbours, keep)
    tests = result.get("tests", {})
    fuzz_failed = any(x["failed"] for x in result.get("fuzz", {}).values())
    sanitizer = [x for x in result.get("sanitizer", {}).values() if isinstance(x, dict)]
    not_clean = not all(x["clean"] for x in sanitizer)
    return 1 if unfinished or fuzz_failed or tests.get("failed", 0) or tests.get("skipped", 0) or not_clean else 0


if __name__ == "__main__":
    sys.exit(main())
