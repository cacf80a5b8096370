"""Markdown tables from a results file: python -m benchmarks.report benchmarks/results/h200/latest.json"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

from benchmarks.problems import AMPERE_PEER_MS, BEST_PEER_MS, NEIGHBOURS, PROBLEMS


def _times(
    rows: list[dict[str, Any]], implementation: str, dtype: str = "bfloat16"
) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["problem"], r["pass"]): r for r in rows if r["implementation"] == implementation and r["dtype"] == dtype}


def _mean(ratios: list[float]) -> str:
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x" if ratios else "-"


def comparison(rows: list[dict[str, Any]], implementation: str, peers: dict[str, tuple[float, float]]) -> str:
    """One line per problem: ours, the peer's, the ratio, and the distance to the bound, forward and backward."""
    ours = _times(rows, implementation)
    lines = [
        "| problem | window | forward ms | peer | ratio | x bound | backward ms | peer | ratio | x bound |",
        "|---" * 10 + "|",
    ]
    ratios: dict[str, list[float]] = {"fwd": [], "bwd": []}
    for name, peer in peers.items():
        case = PROBLEMS[name]
        shape = "x".join(map(str, case.spatial))
        cells = [f"`{name}` {case.batch}, {shape}, {case.heads}, {case.dim}", str(case.window)]
        for which, other in zip(("fwd", "bwd"), peer, strict=True):
            row = ours.get((name, which))
            if row is None:
                cells += ["-", f"{other:g}", "-", "-"]
                continue
            ratios[which].append(other / row["ms"])
            bound = f"{row['ms'] / row['bound_ms']:.2f}"
            cells += [f"{row['ms']:.3g}", f"{other:g}", f"{other / row['ms']:.2f}x", bound]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Geometric mean: {_mean(ratios['fwd'])} forward, {_mean(ratios['bwd'])} backward."])


def against(rows: list[dict[str, Any]], fast: str, slow: str, dtype: str) -> str:
    """Geometric mean of ``slow / fast`` by rank and pass."""
    first, second = _times(rows, fast, dtype), _times(rows, slow, dtype)
    lines = []
    for which in ("fwd", "bwd"):
        for rank in (1, 2, 3):
            keys = [k for k in first if k in second and k[1] == which and len(PROBLEMS[k[0]].spatial) == rank]
            ratios = [second[k]["ms"] / first[k]["ms"] for k in keys]
            lines.append(f"{fast} over {slow}, {dtype}, {which}, {rank}-D, {len(keys)} rows: {_mean(ratios)}")
    return "\n".join(lines)


def unfused(rows: list[dict[str, Any]], dtype: str) -> str:
    """The direct kernels, the unfused pair on tensor cores (whole attention) and the fused kernels, by problem; forward, and
    forward + backward. Problems that all three have; geometric means by rank."""
    names = ("cuda_naive", "cuda_gemm", "cuda_fused")
    times = [_times(rows, name, dtype) for name in names]
    header = " | ".join(f"{which}: direct | GEMM | fused | direct / GEMM | GEMM / fused" for which in ("fwd", "fwd + bwd"))
    lines = [f"| problem, {dtype} | {header} |", "|---" * 11 + "|"]
    ratios: dict[int, list[list[float]]] = {}
    for name, case in PROBLEMS.items():
        if not all((name, which) in found for found in times for which in ("fwd", "bwd")):
            continue
        cells = []
        for passes in (("fwd",), ("fwd", "bwd")):
            direct, gemm, fused = (sum(found[name, which]["ms"] for which in passes) for found in times)
            ratio = [direct / gemm, gemm / fused]
            cells += [f"{ms:.3g}" for ms in (direct, gemm, fused)] + [f"{x:.2f}x" for x in ratio]
            ratios.setdefault(len(case.spatial), []).append([*ratio, len(passes)])
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    for rank, found in sorted(ratios.items()):
        cells = []
        for passes in (1, 2):
            cells += ["", "", "", *(_mean([row[i] for row in found if row[2] == passes]) for i in (0, 1))]
        lines.append("| " + " | ".join([f"geometric mean, {rank}-D", *cells]) + " |")
    return "\n".join(lines)


def neighbours(rows: list[dict[str, Any]]) -> str:
    """How far from its own bound every row is, and its neighbours as a multiple of that: above 1.2, tiles were chosen badly."""
    ours = _times(rows, "cuda")
    lines = ["| row | forward, x bound | neighbours | backward, x bound | neighbours |", "|---" * 5 + "|"]
    for name in PROBLEMS:
        cells = []
        for which in ("fwd", "bwd"):
            over = {x: r["ms"] / r["bound_ms"] for (x, p), r in ours.items() if p == which and x.split(":")[0] == name}
            beside = [f"{x / over[name]:.2f}" for other, x in sorted(over.items()) if other in NEIGHBOURS and name in over]
            cells += [f"{over[name]:.2f}" if name in over else "-", ", ".join(beside)]
        if cells[1]:
            lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    result = json.loads(pathlib.Path(sys.argv[1]).read_text())
    print(neighbours(result["rows"]), "\n")
    rows = [r for r in result["rows"] if r["problem"] in PROBLEMS]
    print(comparison(rows, "cuda", BEST_PEER_MS), "\n")
    print(comparison(rows, "cuda_fused", AMPERE_PEER_MS), "\n")
    for dtype in sorted({r["dtype"] for r in rows}):
        print(unfused(rows, dtype), "\n")
        print(against(rows, "cuda_fused", "cuda_naive", dtype), "\n")


if __name__ == "__main__":
    main()
