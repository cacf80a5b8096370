"""What tests ask of compiled programs."""

from __future__ import annotations

import re
from typing import Any

import jax

# Optimizing machine code is half of a compilation on CPU; for tests that are about collectives, and numbers to a tolerance.
# (Options of jax.jit; the fixture quick_compilation of tests/conftest.py does the same to every compilation in a test.)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Before JAX 0.11, XLA's older code generators for CPU are still there, and two to five times as quick to compile. The test suite
# chooses them (tests/conftest.py); what is tested as users compile it is given these options.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}

COLLECTIVES = frozenset({"all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter"})
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(sorted(COLLECTIVES))})(?:-start)?\(")
_SHAPE = re.compile(r"\b(?:f32|bf16|f16|f64)\[([\d,]*)\]")


def collectives(compiled: Any) -> set[str]:
    """The kinds of collective operations in a compiled program."""
    return {kind for _, kind in _OPERATION.findall(compiled.as_text())}


def traffic(compiled: Any) -> dict[str, int]:
    """Elements each device receives, by kind of collective (of a program for CPU, where they are synchronous)."""
    result: dict[str, int] = {}
    for shapes, kind in _OPERATION.findall(compiled.as_text()):
        for dims in _SHAPE.findall(shapes):
            elements = 1
            for size in filter(None, dims.split(",")):
                elements *= int(size)
            result[kind] = result.get(kind, 0) + elements
    return result
