"""The fused kernels of SM 8.0: every kernel the cost model chooses from, forced one by one."""

import jax.numpy as jnp
import pytest
from test_attention import check

from jax_na.testing.cases import Case

pytestmark = pytest.mark.gpu
PASSES = ("forward", "grad_query", "grad_key_value")
# The choice of a shape is made once, so every forced one needs a shape of its own.
BOXES = {64: ((22, 31), "1x8x8"), 128: ((23, 30), "1x8x16")}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "dim"), [(64, 32), (64, 64), (64, 128), (128, 64), (128, 128)])
def test_kernels_of_64_and_128_rows(rows, dim, dtype, monkeypatch, capfd):
    spatial, box = BOXES[rows]
    monkeypatch.setenv("JAX_NA_FUSED_TILE", ",".join(f"{name}={rows}:{box}" for name in PASSES))
    monkeypatch.setenv("JAX_NA_EXPLAIN", "1")
    shape = {"spatial": spatial, "heads": 4, "kv_heads": 2, "dim": dim}
    check(Case("plain", window=(9, 12), **shape), "cuda_fused", dtype)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("jax_na fused")]
    if said:  # the first of the two dtypes
        assert len(said) == 3 and f"{rows} rows" in said[0] and f"box {box}" in said[0], said
    check(
        Case("bias", window=(7, 5), stride=(2, 1), is_causal=(False, True), bias=True, extra=70, **shape),
        "cuda_fused",
        dtype,
    )
    check(Case("dilated", window=(5, 6), dilation=(2, 3), extra=1, **shape), "cuda_fused", dtype)
