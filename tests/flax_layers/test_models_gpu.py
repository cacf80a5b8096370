"""Models on a GPU: the CUDA kernels within a model agree with XLA, forward, gradient and a training step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flax_layers import models, training

pytestmark = pytest.mark.gpu


def dinat(**overrides) -> models.NAT:
    """Head dimension 32, window 7x7 with bias, dilated blocks: as the published ones, with fewer levels and features."""
    return models.NAT(
        embed_dim=64,
        depths=(2, 2),
        num_heads=(2, 4),
        mlp_ratio=3.0,
        dilations=((1, 4), (1, 2)),
        num_classes=10,
        drop_path_rate=0.0,
        layer_scale=1.0,
        **overrides,
        rngs=nnx.Rngs(0),
    )


def generator(**overrides) -> models.StyleNAT:
    """Levels 4x4 (full attention), 8x8 (one geometry), 16x16 (two: 4 heads each)."""
    return models.StyleNAT(
        image_size=16,
        style_dim=64,
        mapping_depth=2,
        channels=(128, 256, 256),
        windows=((7,), (7,)),
        dilations=((1,), (1, 2)),
        **overrides,
        rngs=nnx.Rngs(0),
    )


MODELS = {"dinat": (dinat, (2, 112, 112, 3)), "stylenat": (generator, (2, 64))}


def outputs_and_gradients(make, implementation, shape, dtype):
    model = make(implementation=implementation, dtype=dtype)
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    weights = jax.random.normal(jax.random.key(2), jax.eval_shape(lambda m, x: m(x), model, x).shape)

    def loss(model, x):
        y = model(x).astype(jnp.float32)
        return jnp.vdot(weights, y), y

    (_, y), grads = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(model, x)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (y, jax.tree.leaves(grads)))


def distance(a, b) -> float:
    """Of two arrays, as a fraction of the norm of the second."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


@pytest.mark.parametrize("name", MODELS)
def test_cuda_kernels_agree_with_xla_within_a_model(name):
    """In bfloat16, against the float32 model: no farther than a small multiple of what XLA's bfloat16 is."""
    make, shape = MODELS[name]
    exact, exact_grads = outputs_and_gradients(make, "xla", shape, jnp.float32)
    far, far_grads = outputs_and_gradients(make, "xla", shape, jnp.bfloat16)
    near, near_grads = outputs_and_gradients(make, "cuda", shape, jnp.bfloat16)
    assert distance(near, exact) < 2 * distance(far, exact) + 1e-3
    norm = np.sqrt(sum(np.sum(g**2) for g in exact_grads))
    for ours, theirs, reference in zip(near_grads, far_grads, exact_grads, strict=True):
        error, allowed = np.linalg.norm(ours - reference), np.linalg.norm(theirs - reference)
        assert error < 2 * allowed + 2e-3 * np.linalg.norm(reference) + 1e-4 * norm


def test_a_training_step_on_the_gpu_lowers_the_loss():
    trainer = training.make_trainer(
        lambda: dinat(dtype=jnp.bfloat16), optax.adam(1e-3), mesh=training.data_mesh(jax.local_devices()[:1])
    )
    state = trainer.init()
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 10
    images = (rng.standard_normal((16, 112, 112, 3)) + labels[:, None, None, None]).astype(np.float32)
    batch = training.Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(16))
    losses = []
    for _ in range(12):
        state, metrics = trainer.train_step(state, batch)
        losses.append(float(metrics.loss / metrics.weight))
    assert all(np.isfinite(losses)) and losses[-1] < 0.9 * losses[0], losses
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
