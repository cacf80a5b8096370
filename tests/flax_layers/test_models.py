"""The registered models: parameter counts and work as published, any size, transforms, checkpoints."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flax_layers import WindowFitWarning, checkpoints, models

# name: parameters (1000 classes), multiply-accumulates at 224 px as published, in G.
PUBLISHED = {
    "nat_mini": (19_984_174, 2.7),
    "nat_tiny": (27_901_582, 4.3),
    "nat_small": (50_743_297, 7.8),
    "nat_base": (89_769_652, 13.7),
    "dinat_mini": (19_984_174, 2.7),
    "dinat_tiny": (27_901_582, 4.3),
    "dinat_small": (50_719_681, 7.8),
    "dinat_base": (89_769_652, 13.7),
    "dinat_large": (200_943_514, 30.6),
    "dinat_large_384": (200_943_514, None),
    "dinat_large_384_11x11": (201_144_250, None),
    "dinat_s_tiny": (28_288_354, 4.5),
    "dinat_s_small": (49_606_258, 8.7),
    "dinat_s_base": (87_768_224, 15.4),
    "dinat_s_large": (196_532_476, 34.5),
    "dinat_s_large_384": (196_532_476, None),
    "nat_isotropic_small": (21_999_736, 4.3),
    "nat_isotropic_base": (86_465_800, 16.9),
    "dinat_isotropic_small": (21_999_736, 4.3),
    "dinat_isotropic_base": (86_465_800, 16.9),
}
# Parameters in millions, as published, to 0.01.
GENERATORS = {"stylenat_ffhq_256": 48.92, "stylenat_ffhq_1024": 49.45}


def maker(name: str, **overrides):
    return lambda: models.create(name, rngs=nnx.Rngs(0), **overrides)


def small(**overrides) -> models.NAT:
    options = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "mlp_ratio": 2.0, "dilations": ((1, 2), (1, 1))}
    return models.NAT(
        **(options | {"window_size": 3, "num_classes": 5, "drop_path_rate": 0.0} | overrides), rngs=nnx.Rngs(0)
    )


def test_every_registered_model_is_checked_here():
    assert set(models.names()) == set(PUBLISHED) | set(GENERATORS)


@functools.cache
def abstract(name: str):
    return nnx.eval_shape(maker(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_work_are_the_published_ones(name):
    parameters, work = PUBLISHED[name]
    assert models.count_parameters(abstract(name)) == parameters
    if work is not None:
        assert models.count_macs(abstract(name), (1, 224, 224, 3)) / 1e9 == pytest.approx(work, rel=0.03)


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_have_the_published_size(name):
    assert round(models.count_parameters(abstract(name)) / 1e6, 2) == GENERATORS[name]


def test_registry():
    assert models.config("dinat_tiny")["dilations"] == ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 9, (1,) * 5)
    assert models.config("dinat_large_384")["dilations"][0] == (1, 13, 1)
    with pytest.raises(ValueError, match="model 'resnet' is unknown: expected one of nat_mini"):
        models.create("resnet", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="registered already"):
        models.register("nat_mini", models.NAT)
    wide = nnx.eval_shape(maker("nat_mini", num_classes=0, in_channels=1))
    assert wide.head is None
    assert wide.patch_embed.proj[0].kernel.shape == (3, 3, 1, 32)


SMALL = {
    "nat": small,
    "dinat_s": lambda **overrides: models.DiNATs(
        **({"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "window_size": 3, "num_classes": 5} | overrides),
        drop_path_rate=0.0,
        rngs=nnx.Rngs(0),
    ),
    "isotropic": lambda **overrides: models.Isotropic(
        **({"embed_dim": 16, "depth": 2, "num_heads": 2, "window_size": 3, "patch_size": 4} | overrides),
        num_classes=5,
        dilations=(1, 2),
        drop_path_rate=0.0,
        rngs=nnx.Rngs(0),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_jit_grad_and_features(name, built):
    images = jax.random.normal(jax.random.key(0), (2, 27, 34, 3))

    def loss(model, x):
        logits = model(x)
        return jnp.sum(logits**2), (logits, model.features(x))

    grads, (logits, features) = nnx.jit(nnx.grad(loss, has_aux=True))(built(SMALL[name]), images)
    assert logits.shape == (2, 5)
    assert len(features) == (1 if name == "isotropic" else 2)
    for i, feature in enumerate(features):
        step = 4 * 2**i
        assert feature.shape[1:3] == (-(-27 // step), -(-34 // step))
    assert all(np.isfinite(g).all() and np.any(g != 0) for g in jax.tree.leaves(grads))


def test_vmap_and_bf16(built):
    images = jax.random.normal(jax.random.key(0), (2, 24, 24, 3))
    call = nnx.jit(lambda model, x: model(x))
    model = built(SMALL["isotropic"])
    logits = call(model, images)
    mapped = nnx.jit(nnx.vmap(lambda model, x: model(x[None])[0], in_axes=(None, 0)))(model, images)
    np.testing.assert_allclose(mapped, logits, atol=1e-5)
    half = built(functools.partial(SMALL["isotropic"], dtype=jnp.bfloat16))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(half, nnx.Param)))
    out = call(half, images)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), logits, atol=0.05)


def test_remat_changes_nothing(built):
    images = jax.random.normal(jax.random.key(0), (1, 24, 24, 3))
    grad = nnx.jit(nnx.grad(lambda model: jnp.sum(model(images) ** 2)))
    make = functools.partial(small, depths=(2,), num_heads=(2,), dilations=None)
    models_ = (built(functools.partial(make, remat=remat)) for remat in (False, True))
    for a, b in zip(*(jax.tree.leaves(grad(model)) for model in models_), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_small_images_shrink_the_dilation_and_say_so():
    image = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    options = {"window_size": 7, "dilations": ((1, 8), (1, 2))}
    with pytest.warns(WindowFitWarning) as caught:
        assert nnx.eval_shape(lambda x: small(**options)(x), image).shape == (1, 5)
    assert [str(warning.message) for warning in caught] == [
        "window_size=(7, 7) * dilation=(8, 8) = (56, 56) exceeds the input's (32, 32) tokens: "
        "using window_size=(7, 7), dilation=(4, 4) (fit='shrink')"
    ]
    with pytest.raises(ValueError, match="fit='shrink'"):
        nnx.eval_shape(lambda x: small(fit="error", **options)(x), image)
    with pytest.raises(ValueError, match=r"expected \[batch, height, width, 3\]"):
        nnx.eval_shape(lambda: small()(jnp.ones((1, 32, 32, 4))))


def test_stylenat_small(built):
    make = functools.partial(
        models.StyleNAT,
        image_size=16,
        style_dim=32,
        mapping_depth=2,
        channels=(64, 64, 32),
        min_heads=2,
        windows=((3,), (5,)),
    )
    z = jax.random.normal(jax.random.key(0), (2, 32))

    def loss(model):
        images = model(z)
        return jnp.mean(images**2), images

    grads, images = nnx.jit(nnx.grad(loss, has_aux=True))(built(lambda: make(rngs=nnx.Rngs(0))))
    assert images.shape == (2, 16, 16, 3)
    assert bool(jnp.isfinite(images).all())
    assert np.any(grads.layers[1].blocks[0].attn.rpb[0][...] != 0)
    assert nnx.eval_shape(lambda: make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(z)).dtype == jnp.float32
    with pytest.raises(ValueError, match="image_size=24"):
        make(image_size=24, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_the_ffhq_256_generator_makes_an_image(built):
    model = built(maker("stylenat_ffhq_256"))
    assert round(models.count_parameters(model) / 1e6, 2) == GENERATORS["stylenat_ffhq_256"]
    images = np.asarray(nnx.jit(lambda model, z: model(z))(model, jax.random.normal(jax.random.key(0), (1, 512))))
    assert images.shape == (1, 256, 256, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0


def test_stylenat_calls_a_kernel_once_per_layer_and_geometry():
    """Lowered for a GPU: two blocks at 8x8 with one geometry, two each at 16x16 and 32x32 with two."""
    graph, state = nnx.split(abstract_generator())
    z = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    traced = jax.jit(lambda state, z: nnx.merge(graph, state)(z)).trace(state, z)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@jax_na_forward(") == 2 * 1 + 4 * 2


def abstract_generator():
    options = {"image_size": 32, "style_dim": 64, "mapping_depth": 1, "channels": (64,) * 4, "min_heads": 2}
    options |= {"windows": ((7,),) * 3, "dilations": ((1,), (1, 2), (1, 4)), "dtype": jnp.bfloat16}
    return nnx.eval_shape(lambda: models.StyleNAT(**options, implementation="cuda", rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_checkpoints_round_trip(layout, built, tmp_path):
    model = built(functools.partial(small, layer_scale=0.1))
    path = tmp_path / "weights.safetensors"
    checkpoints.save(model, path, layout, prefix="dinat." if layout == "huggingface" else "")
    other = checkpoints.load_pretrained(lambda: small(layer_scale=0.3), path)
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, other)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_original_names_are_the_published_ones(built):
    tensors = checkpoints.to_state_dict(built(functools.partial(small, layer_scale=0.1)))
    assert {
        "patch_embed.proj.0.weight",
        "patch_embed.proj.1.bias",
        "patch_embed.norm.weight",
        "levels.0.blocks.1.norm1.weight",
        "levels.0.blocks.1.attn.qkv.bias",
        "levels.0.blocks.1.attn.rpb",
        "levels.0.blocks.1.attn.proj.weight",
        "levels.0.blocks.1.mlp.fc1.weight",
        "levels.0.blocks.1.gamma2",
        "levels.0.downsample.reduction.weight",
        "levels.0.downsample.norm.bias",
        "norm.weight",
        "head.bias",
    } <= set(tensors)
    assert tensors["patch_embed.proj.1.weight"].shape == (16, 8, 3, 3)
    assert tensors["levels.0.blocks.1.attn.qkv.weight"].shape == (48, 16)
    assert "layers.0.downsample.reduction.weight" in checkpoints.to_state_dict(built(SMALL["dinat_s"]))
    assert "layers.1.attn.rpb" in checkpoints.to_state_dict(built(SMALL["isotropic"]))


def test_all_errors_of_a_checkpoint_come_in_one_message(built):
    model = built(small)
    tensors = checkpoints.to_state_dict(model)
    tensors["levels.0.blocks.0.attn.rpb"] = np.zeros((2, 13, 13), np.float32)
    tensors["head.weight"] = np.zeros((7, 32), np.float32)
    tensors["extra.weight"] = tensors.pop("norm.bias")
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.from_state_dict(model, tensors)
    message = str(caught.value)
    assert "4 problems" in message
    for part in (
        "levels.0.blocks.0.attn.rpb: shape (2, 13, 13) in the checkpoint, the model's levels.0.blocks.0.attn.rpb needs "
        "(2, 5, 5)",
        "head.weight: shape (7, 32) in the checkpoint, the model's head.weight needs (5, 32)",
        "norm.bias: missing in the checkpoint",
        "extra.weight: in the checkpoint, but not in the model",
    ):
        assert part in message
    kept = checkpoints.from_state_dict(model, tensors, ignore=r"^head\.|rpb|norm\.bias|^extra")
    np.testing.assert_array_equal(kept.head.kernel[...], model.head.kernel[...])
    with pytest.raises(checkpoints.CheckpointError, match="no name in the Hugging Face layout"):
        checkpoints.to_state_dict(built(SMALL["isotropic"]), "huggingface")
