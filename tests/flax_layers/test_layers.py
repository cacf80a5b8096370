"""The layers, NNX and Linen: against the definition, against each other, under transforms, and their errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_layers
import jax_na
from flax_layers import _functional, linen

GEOMETRIES = [
    {"window_size": (5,), "dilation": 2},
    {"window_size": (3, 5), "stride": (1, 2), "is_causal": (True, False)},
    {"window_size": 3, "rank": 3, "dilation": (1, 2, 1)},
]
LENGTHS = {1: (13,), 2: (7, 9), 3: (4, 7, 5)}


def tokens(rank: int, features: int = 16, batch: int = 2, dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (batch, *LENGTHS[rank], features), dtype)


call = nnx.jit(lambda layer, x: layer(x))  # one program each, instead of one per operation


@nnx.jit
def by_hand(layer: flax_layers.NeighborhoodAttention, x: jax.Array) -> jax.Array:
    """The layer, written out with the reference implementation."""
    h, g, d = layer.num_heads, layer.num_kv_heads, layer.head_dim
    qkv = x @ layer.qkv.kernel[...] + (0 if layer.qkv.bias is None else layer.qkv.bias[...])
    q, k, v = jnp.split(qkv, [h * d, (h + g) * d], -1)
    geometry = layer.geometry
    out = jax_na.neighborhood_attention(
        q.reshape(*x.shape[:-1], h, d),
        k.reshape(*x.shape[:-1], g, d),
        v.reshape(*x.shape[:-1], g, d),
        geometry.window,
        stride=geometry.stride,
        dilation=geometry.dilation,
        is_causal=geometry.is_causal,
        scale=layer.scale,
        bias=None if layer.rpb is None else layer.rpb[...],
        implementation="reference",
    )
    return out.reshape(*x.shape[:-1], h * d) @ layer.proj.kernel[...] + (
        0 if layer.proj.bias is None else layer.proj.bias[...]
    )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["1d", "2d", "3d"])
@pytest.mark.parametrize(
    "options",
    [{}, {"relative_bias": True}, {"num_kv_heads": 2, "head_dim": 6, "use_bias": False}, {"scale": 0.3, "qkv_bias": False}],
    ids=["plain", "rpb", "gqa", "scale"],
)
def test_layer_is_the_definition_between_two_projections(geometry, options):
    layer = flax_layers.NeighborhoodAttention(
        16, 4, **geometry, **options, bias_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0)
    )
    x = tokens(layer.geometry.rank)
    np.testing.assert_allclose(call(layer, x), by_hand(layer, x), atol=2e-5)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["1d", "2d", "3d"])
def test_linen_and_nnx_agree(geometry):
    options = {"relative_bias": True, "num_kv_heads": 2, **geometry}
    layer = flax_layers.NeighborhoodAttention(16, 4, **options, rngs=nnx.Rngs(0))
    x = tokens(layer.geometry.rank)
    module = linen.NeighborhoodAttention(4, **options)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, {"params": params}) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), call(layer, x), atol=1e-6)


def test_hydra_groups_have_their_own_geometry_and_bias():
    """5 heads in 3 groups (1, 2, 2); groups 0 and 2 share a geometry, so two calls serve, and heads stay in order."""
    layer = flax_layers.HydraNeighborhoodAttention(20, 5, [3, 5, 3], [1, 2, 1], rank=2, rngs=nnx.Rngs(0))
    assert layer.heads_per_group == (1, 2, 2)
    assert [rpb.shape for rpb in layer.rpb] == [(1, 5, 5), (2, 9, 9), (2, 5, 5)]
    x = jax.random.normal(jax.random.key(0), (2, 10, 11, 20))

    @nnx.jit
    def group_by_group(layer, x):
        q, k, v = _functional.split_heads(layer.qkv(x), 5, 5, 4)
        outs, first = [], 0
        for size, geometry, rpb in zip(layer.heads_per_group, layer.geometries, layer.rpb, strict=True):
            heads = slice(first, first + size)
            outs.append(
                jax_na.neighborhood_attention(
                    q[..., heads, :],
                    k[..., heads, :],
                    v[..., heads, :],
                    geometry.window,
                    dilation=geometry.dilation,
                    bias=rpb[...],
                    implementation="reference",
                )
            )
            first += size
        return layer.proj(_functional.merge_heads(jnp.concatenate(outs, -2)))

    out = call(layer, x)
    np.testing.assert_allclose(out, group_by_group(layer, x), atol=1e-5)
    calls = _functional.distinct_calls(layer.geometries, layer.heads_per_group)
    assert [call.heads for call in calls] == [(0, 3, 4), (1, 2)]

    module = linen.HydraNeighborhoodAttention(5, (3, 5, 3), (1, 2, 1), rank=2)
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    params |= {f"rpb_{group}": rpb for group, rpb in params.pop("rpb").items()}
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), out, atol=1e-6)


def test_jit_grad_vmap_bf16_and_eval_shape():
    def make(dtype=None):
        return flax_layers.NeighborhoodTransformerBlock(
            16, 4, (3, 5), relative_bias=True, layer_scale=1e-1, dtype=dtype, rngs=nnx.Rngs(0)
        )

    block, x = make(), tokens(2)
    y = block(x)
    np.testing.assert_allclose(call(block, x), y, atol=1e-5)
    grads = nnx.jit(nnx.grad(lambda m: jnp.mean(m(x) ** 2)))(block)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    stacked = jnp.stack([x, x + 1])
    mapped = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(block, stacked)
    np.testing.assert_allclose(mapped[0], y, atol=1e-5)
    half = make(jnp.bfloat16)
    assert half.attn.rpb.dtype == jnp.float32
    out = call(half, x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), y, atol=0.1)
    abstract = nnx.eval_shape(make)
    assert abstract.attn.rpb.shape == (4, 5, 9)


def test_linen_block_agrees_with_the_nnx_block():
    block = flax_layers.NeighborhoodTransformerBlock(16, 4, (3, 5), dilation=(1, 1), layer_scale=0.5, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(block, nnx.Param))
    params |= params.pop("mlp")
    module = linen.NeighborhoodTransformerBlock(4, (3, 5), layer_scale=0.5)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, tokens(2)), call(block, tokens(2)), atol=1e-5)


def test_projection_dropout_and_stochastic_depth_follow_train_and_eval():
    x = tokens(2, batch=8)
    layer = flax_layers.NeighborhoodAttention(16, 4, (3, 3), projection_dropout_rate=0.5, rngs=nnx.Rngs(0, dropout=1))
    dropped = np.mean(np.asarray(call(layer, x)) == 0)
    assert 0.4 < dropped < 0.6
    layer.eval()
    assert np.mean(np.asarray(call(layer, x)) == 0) < 0.01
    block = flax_layers.NeighborhoodTransformerBlock(16, 4, (3, 3), drop_path_rate=0.5, rngs=nnx.Rngs(0, dropout=3))
    kept = np.any(np.asarray(call(block, x) != x), axis=(1, 2, 3))
    assert 0 < kept.sum() <= 8
    settled = nnx.jit(lambda block, x: block(x, deterministic=True))
    np.testing.assert_array_equal(settled(block, x), settled(block, x))


def test_fit_rules():
    geometry = _functional.make_geometry((7, 7), dilation=(8, 2))
    with pytest.warns(flax_layers.WindowFitWarning, match=r"dilation=\(4, 2\)"):
        assert _functional.fit_geometry(geometry, (28, 28), "shrink")[0].dilation == (4, 2)
    assert _functional.shrink_to_fit(geometry, (6, 14)) == _functional.make_geometry((5, 7), dilation=(1, 2))
    with pytest.raises(ValueError, match=r"\(56, 14\) exceeds the input's \(28, 28\).*fit='shrink'"):
        _functional.fit_geometry(geometry, (28, 28), "error")
    for fit in ("shrink", "pad"):
        layer = flax_layers.NeighborhoodAttention(16, 4, (7, 7), dilation=2, relative_bias=True, fit=fit, rngs=nnx.Rngs(0))
        with pytest.warns(flax_layers.WindowFitWarning):
            assert layer(jnp.ones((1, 6, 9, 16))).shape == (1, 6, 9, 16)
    bias = jnp.arange(13.0)[None]
    np.testing.assert_array_equal(_functional.crop_bias(bias, (5,)), bias[:, 2:11])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((16, 4, 7), {}, "window_size=7 is a scalar"),
        ((16, 4, (7, 7)), {"rank": 3}, "rank=3 contradicts"),
        ((16, 3, (7, 7)), {}, "in_features=16 is not a multiple of num_heads=3"),
        ((16, 4, (7, 7)), {"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ((16, 4, (7, 7)), {"stride": 8}, "stride=8 on spatial axis 0 exceeds window_size=7"),
        ((16, 4, (7, 7)), {"dilation": (1, 0)}, "dilation=0 on spatial axis 1"),
        ((16, 4, (6, 7)), {"relative_bias": True}, "needs an odd window_size"),
        ((16, 4, (7, 7)), {"fit": "crop"}, "fit='crop' is unknown"),
        ((16, 4, (7, 7)), {"dropout_rate": 1.5}, "dropout rate 1.5"),
        ((16, 4, (3, 3, 3, 3)), {}, "rank=4"),
    ],
    ids=lambda value: None,
)
def test_illegal_arguments(arguments, error, message):
    with pytest.raises(ValueError, match=message):
        flax_layers.NeighborhoodAttention(*arguments, **error, rngs=nnx.Rngs(0))


def test_illegal_inputs():
    layer = flax_layers.NeighborhoodAttention(16, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expects \[batch, height, width, features\]"):
        layer(jnp.ones((2, 9, 16)))
    with pytest.raises(ValueError, match="8 features, the layer has in_features=16"):
        layer(jnp.ones((2, 9, 9, 8)))
    with pytest.raises(ValueError, match="exceeds the input's"):
        layer(jnp.ones((2, 2, 9, 16)))
    with pytest.raises(TypeError, match="window_size must be an integer"):
        flax_layers.NeighborhoodAttention(16, 4, (3.5, 3), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"dilation must be an integer .* got \(True, 1\)"):
        flax_layers.NeighborhoodAttention(16, 4, (3, 3), dilation=(True, 1), rngs=nnx.Rngs(0))
    for name, value in (("num_heads", 4.0), ("num_kv_heads", 2.0), ("head_dim", "4")):
        options = {"num_heads": 4, name: value}
        with pytest.raises(TypeError, match=f"{name}={value!r}: it must be an integer"):
            flax_layers.NeighborhoodAttention(16, window_size=(3, 3), **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="6 window groups for num_heads=4"):
        flax_layers.HydraNeighborhoodAttention(16, 4, [3] * 6, rank=2, rngs=nnx.Rngs(0))


def test_implementation_while_dropout_acts():
    """The name counts where it has an unfused pair, and a wrong one is refused in training as in evaluation."""

    def layer(implementation):
        options = {"dropout_rate": 0.5, "implementation": implementation}
        return flax_layers.NeighborhoodAttention(16, 4, (3, 3), **options, rngs=nnx.Rngs(0))

    x = tokens(2)
    with pytest.raises(ValueError, match="implementation='magic' is unknown"):
        layer("magic")(x)
    on_cpu = jax.default_device(jax.devices("cpu")[0])
    with on_cpu, pytest.raises(NotImplementedError, match="'cuda_gemm' cannot serve this call"):
        layer("cuda_gemm")(tokens(2))
    outs = [call(layer(name), x) for name in (None, "xla", "xla_unfused", "reference", "cuda_fused")]
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-5)


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_zero_size_batch(dropout_rate):
    options = {"window_size": (3, 3), "relative_bias": True, "num_kv_heads": 2, "dropout_rate": dropout_rate}
    layer = flax_layers.NeighborhoodAttention(16, 4, **options, rngs=nnx.Rngs(0))
    x = tokens(2)[:0]
    assert call(layer, x).shape == x.shape
    grads = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x))))(layer)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    module = linen.NeighborhoodAttention(4, **options)
    assert module.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(0)}).shape == x.shape


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["1d", "2d", "3d"])
def test_attention_dropout_acts_on_the_weights(geometry):
    """Through the unfused pair: kept weights reproduce the layer, dropped ones are zero, and causal masks survive."""
    options = {"relative_bias": True, "num_kv_heads": 2, **geometry}
    layer = flax_layers.NeighborhoodAttention(16, 4, dropout_rate=0.5, **options, rngs=nnx.Rngs(0, dropout=1))
    x = tokens(layer.geometry.rank)
    expected = nnx.jit(lambda layer, x: layer(x, deterministic=True))(layer, x)
    np.testing.assert_allclose(expected, by_hand(layer, x), atol=2e-5)

    @nnx.jit
    def attend(layer, x):
        q, k, v = layer._heads(x)
        dropouts = {"kept": lambda w: w, "halved": lambda w: w / 2, "fused": None}
        bias = layer.rpb[...]
        return {
            name: _functional.attend(q, k, v, layer.geometry, bias=bias, dropout=dropout)
            for name, dropout in dropouts.items()
        }

    attended = attend(layer, x)
    np.testing.assert_allclose(attended["kept"], attended["fused"], atol=1e-5)
    np.testing.assert_allclose(attended["halved"], attended["fused"] / 2, atol=1e-5)
    # The mean of 25 draws is five times as close as one draw.
    draws = np.stack([call(layer, x) for _ in range(25)])
    assert np.abs(draws.mean(0) - expected).mean() < 0.35 * np.abs(draws[0] - expected).mean()
    seeded = nnx.jit(lambda layer, x, rngs: layer(x, rngs=rngs))
    first, second = (seeded(layer, x, nnx.Rngs(dropout=7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    grads = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x) ** 2)))(layer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    module = linen.NeighborhoodAttention(4, dropout_rate=0.5, **options)
    params = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    apply = jax.jit(module.apply, static_argnames="deterministic")
    np.testing.assert_allclose(apply(params, x, deterministic=True), expected, atol=1e-6)
    dropped = apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert np.abs(dropped - expected).max() > 0.01
