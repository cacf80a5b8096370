"""Eight CPU devices, so that sharding is tested everywhere; skips for machines without a GPU."""

import ctypes
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

# For `benchmarks`, which is not installed; last, so that an installed jax_na with its CUDA lane comes before the checkout.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))

if "PYTEST_XDIST_WORKER" in os.environ and "JAX_NA_SPREAD_OVER_GPUS" in os.environ:
    # Workers take turns among the GPUs of a machine: "JAX_NA_SPREAD_OVER_GPUS=4".
    _worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.environ["CUDA_VISIBLE_DEVICES"] = str(_worker % int(os.environ["JAX_NA_SPREAD_OVER_GPUS"]))

import jax

from jax_na.testing.compiled import AS_USERS

jax.config.update("jax_num_cpu_devices", 8)
if AS_USERS:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"


def _num_gpus() -> int:
    try:
        return len(jax.devices("gpu"))
    except RuntimeError:
        return 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests need a GPU. JAX_NA_REQUIRE_GPU=1 turns "no GPU: skipped" into a failure, to keep a GPU machine honest."""
    available = _num_gpus()
    if not available and os.environ.get("JAX_NA_REQUIRE_GPU") == "1":
        raise pytest.UsageError("JAX_NA_REQUIRE_GPU=1, but JAX sees no GPU")
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if "case" in parameters and "xdist_group" not in item.keywords:
            # One worker runs a case on every implementation: what they are all held against is computed once.
            item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{parameters['case']}-{parameters.get('dtype')}"))
        needed = 2 if "multi_gpu" in item.keywords else 1 if {"gpu", "sm90"} & set(item.keywords) else 0
        if needed > available:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), JAX sees {available}"))


@pytest.fixture
def quick_compilation():
    """Optimizing machine code is half of a compilation on CPU: for tests of what XLA is given. (test_attention.py, the numbers of
    every implementation, is compiled as users compile.)"""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def compile_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """``compile_library(*sources, flags=())``: host C++, paths from the root of the checkout, with ``cuda/`` to include from."""

    def compile_library(*sources: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
        compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        target = tmp_path_factory.mktemp("library") / "library.so"
        command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", *flags, "-Icuda", *sources, "-o", str(target)]
        subprocess.run(command, check=True, cwd=pathlib.Path(__file__).resolve().parent.parent)
        return ctypes.CDLL(str(target))

    return compile_library
