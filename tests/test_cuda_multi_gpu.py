"""What needs two GPUs or more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_na
from jax_na.testing.cases import Case

pytestmark = pytest.mark.multi_gpu


def test_every_device_is_served_by_itself():
    """The handler works on the device and the stream of the call, not on device 0."""
    case = Case("2d", (20, 21), 5, dim=64)
    run = jax.jit(functools.partial(jax_na.neighborhood_attention, **case.arguments()))
    inputs = case.inputs(jnp.bfloat16)[:3]
    results = [np.asarray(run(*jax.device_put(inputs, device)), np.float32) for device in jax.devices("gpu")]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
