"""Devices of different capability in one process: each call is served by the best family for its own device.

No machine at hand has such a pair, so ``cuda/ffi/dispatch.cc`` runs here over pretended GPUs (``dispatch.cpp``).
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from jax_na import _cuda
from jax_na._spec import Inputs, make_spec

EVERY = b"hopper,fused,naive"


@pytest.fixture(scope="module")
def library(compile_library):
    families = [f"-DJAX_NA_WITH_{name}" for name in ("HOPPER", "FUSED", "NAIVE")]
    flags = (*families, "-Itests/fake_cuda", "-Icuda/common")
    loaded = compile_library("tests/dispatch.cpp", "cuda/ffi/dispatch.cc", flags=flags)
    loaded.serve.restype = ctypes.c_char_p
    loaded.serve.argtypes = [ctypes.c_int, ctypes.c_char_p]
    return loaded


def test_each_device_is_served_by_its_own_best_family(library):
    """The same program, the same list of candidates: what differs is the device of the call."""
    for _ in range(2):
        assert library.serve(0, EVERY) == b"fused on device 0, current 0, 108 SMs"
        assert library.serve(1, EVERY) == b"hopper on device 1, current 1, 132 SMs"
        assert library.serve(2, EVERY) == b"fused on device 2, current 2, 170 SMs"  # Hopper's kernels run on 9.0 only
    assert library.device_now() == 0  # as the caller left it
    reads = library.attribute_reads()
    library.serve(1, EVERY)
    assert library.attribute_reads() == reads  # a device's attributes are read once


def test_the_order_of_the_candidates_decides(library):
    assert library.serve(1, b"naive,hopper").startswith(b"naive on device 1")
    assert library.serve(0, b"hopper,naive").startswith(b"naive on device 0")


def test_a_device_that_nothing_serves_is_told_why(library):
    said = library.serve(3, EVERY).decode()
    assert "compute capability 7.5" in said
    assert "hopper needs compute capability 9.0 exactly; fused needs compute capability 8.0 or newer" in said
    assert "hopper needs compute capability 9.0 exactly" in library.serve(0, b"hopper").decode()
    assert "absent is not in this build" in library.serve(0, b"absent").decode()
    assert "invalid device ordinal" in library.serve(7, EVERY).decode()
    assert "device ordinal 64 is not in 0..63" in library.serve(64, EVERY).decode()


def test_what_python_lists_leads_to_a_family_on_every_device(library):
    """The candidates that a program carries, from the Python side, through the choice on the device."""
    shape = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    spec = make_spec(shape, 5, 1, 1, False, None, None, None, None, False)
    for backward in (False, True):
        names = ",".join(family.name for family in _cuda.candidates(spec, Inputs(shape, shape, shape), backward))
        assert library.serve(0, names.encode()).startswith(b"fused on device 0")
        assert library.serve(1, names.encode()).startswith(b"hopper on device 1")


def test_calls_from_many_threads(library):
    """XLA runs the handlers of several devices from several threads."""
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda i: library.serve(i % 3, b"naive"), range(300)))
    sms = (b"108", b"132", b"170")
    assert said == [b"naive on device %d, current %d, %s SMs" % (i % 3, i % 3, sms[i % 3]) for i in range(300)]
