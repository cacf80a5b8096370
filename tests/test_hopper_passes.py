"""No pass over global memory beside the Hopper kernels: seen in the compiled program and by the profiler."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jax_na import _primitives
from jax_na.testing.cases import Case

pytestmark = [pytest.mark.gpu, pytest.mark.sm90]

CASES = [
    Case("1d", (512,), 64, heads=4, kv_heads=2, dim=128),
    Case("2d-small-window", (28, 28), 7, batch=8, heads=4, kv_heads=4, dim=32),
    Case("2d-dilated", (32, 32), 8, dilation=4, heads=2, kv_heads=2, dim=64),
    Case("3d", (8, 16, 16), (3, 7, 7), heads=2, kv_heads=2, dim=64),
]


def instructions(compiled: jax.stages.Compiled) -> list[str]:
    """The operations of the compiled program that do work: no parameters, tuples and views of them."""
    free = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
    entry = compiled.as_text().split("ENTRY")[1]
    found = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    return [name for name in found if name not in free]


def kernels(function, arguments, folder: Path) -> list[str]:
    """Names of what one call launched on the device."""
    jax.block_until_ready(function(*arguments))
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(function(*arguments))
    (file,) = folder.rglob("*.xplane.pb")
    planes = [
        plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if plane.name.startswith("/device:GPU")
    ]
    return [
        event.name for plane in planes for line in plane.lines if line.name.startswith("Stream") for event in line.events
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_kernel_forward_and_one_with_small_ones_around_it_backward(case, tmp_path):
    spec = case.spec(implementation="cuda_hopper")
    inputs = jax.tree.map(jnp.asarray, case.inputs(jnp.bfloat16))
    grad_out = jnp.asarray(case.cotangents(jnp.bfloat16)[0])

    def forward(inputs):
        return _primitives.forward(spec, inputs, spec.identity_halo(inputs.query))

    out, lse = forward(inputs)

    def backward(inputs, out, lse, grad_out):
        operands = [x for x in inputs if x is not None]
        residuals = (out, lse, grad_out, jnp.asarray(spec.identity_halo(inputs.query)))
        flags = {"has_bias": False, "has_extra": False, "has_grad_lse": False}
        return _primitives.na_backward_p.bind(*operands, *residuals, spec=spec, **flags)

    for name, function, arguments, most in (
        ("forward", forward, (inputs,), 1),
        ("backward", backward, (inputs, out, lse, grad_out), 4),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        assert instructions(compiled) == ["custom-call"], name
        launched = kernels(functools.partial(compiled), arguments, tmp_path / name)
        assert 1 <= len(launched) <= most, launched
        assert all("hopper" in kernel for kernel in launched), launched
