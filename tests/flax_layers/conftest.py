"""Tolerances here are those of float32 products; GPUs would use fewer bits by default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield
