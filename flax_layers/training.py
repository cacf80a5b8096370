"""Training and evaluation steps for classifiers, as pure functions over a :class:`TrainState`.

The batch may be sharded over devices (:func:`data_sharding`); parameters are replicated, and XLA then sums gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_layers._random_state import concrete_random_state

Array = Any
PyTree = Any


class TrainState(NamedTuple):
    """All that a run needs to go on: a pytree of arrays, the parameters in ``param_dtype``."""

    step: Array  # int32 []
    params: PyTree
    opt_state: PyTree


class Batch(NamedTuple):
    """Images ``[B, H, W, C]``, labels ``[B]``, and the weight of each in loss and metrics (0: padding)."""

    images: Array
    labels: Array
    weights: Array


class Metrics(NamedTuple):
    """Sums over a batch, to be divided by ``weight``."""

    loss: Array
    correct: Array
    weight: Array

    def __add__(self, other: Any) -> Metrics:
        return Metrics(*(a + b for a, b in zip(self, other, strict=True)))


class Trainer(NamedTuple):
    """What :func:`make_trainer` returns."""

    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]  # donates the state
    eval_step: Callable[[PyTree, Batch], Metrics]
    model: Callable[[PyTree], Any]  # parameters -> the NNX model in evaluation mode


def decayed(params: PyTree) -> PyTree:
    """Which parameters weight decay applies to: kernels, but neither biases nor norms nor relative positional biases."""

    def rule(path: Any, leaf: Any) -> bool:
        return leaf.ndim >= 2 and not any("rpb" in str(key) for key in path)

    return jax.tree_util.tree_map_with_path(rule, params)


def adamw(
    peak: float, steps: int, *, warmup: int = 0, weight_decay: float = 0.05, final: float = 0.01, clip: float = 5.0
) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay to ``final * peak``, decay of kernels only, and clipping by global norm."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), final * peak
    )
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=weight_decay, mask=decayed),
    )


def data_mesh(devices: Any = None) -> Mesh:
    """One axis, ``"data"``, over the given devices or all local ones."""
    return Mesh(np.asarray(jax.local_devices() if devices is None else devices), ("data",))


def data_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch: split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def _metrics(logits: Array, batch: Batch, label_smoothing: float) -> Metrics:
    logits = logits.astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, logits.shape[-1]), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets)
    correct = (jnp.argmax(logits, -1) == batch.labels).astype(jnp.float32)
    return Metrics(jnp.sum(losses * batch.weights), jnp.sum(correct * batch.weights), jnp.sum(batch.weights))


def make_trainer(
    make_model: Callable[[], Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    label_smoothing: float = 0.0,
    prepare: Callable[[Array], Array] | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    mesh: Mesh | None = None,
) -> Trainer:
    """Jitted steps for the classifier that ``make_model`` builds.

    Args:
      make_model: ``() -> nnx.Module``, which maps images to logits.
      optimizer: an optax transformation.
      seed: of dropout, stochastic depth and ``augment``; every step derives its keys from this and its number, so that a
        resumed run draws what an uninterrupted one would have drawn.
      label_smoothing: of the training loss.
      prepare: what the batch's images go through first, in training and in evaluation, such as normalization.
      augment: ``(key, images) -> images``, applied on the device in training steps.
      mesh: parameters are replicated over it; default: all local devices (:func:`data_mesh`).
    """
    mesh = data_mesh() if mesh is None else mesh
    replicated = NamedSharding(mesh, PartitionSpec())
    graph, _, rest = nnx.split(nnx.eval_shape(make_model), nnx.Param, ...)  # type: ignore[misc]

    def build(params: PyTree) -> Any:
        # What is no parameter is the state of random streams; steps pass their own keys instead.
        return nnx.merge(graph, params, concrete_random_state(rest, seed))

    def init() -> TrainState:
        def start() -> TrainState:
            params = nnx.to_pure_dict(nnx.state(make_model(), nnx.Param))
            return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

        return jax.jit(start, out_shardings=replicated)()

    def loss_of(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        model = build(params)
        model.train()
        logits = model(batch.images, rngs=nnx.Rngs(dropout=key))
        metrics = _metrics(logits, batch, label_smoothing)
        return metrics.loss / jnp.maximum(metrics.weight, 1.0), metrics

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        batch = prepared(batch)
        if augment is not None:
            batch = batch._replace(images=augment(augment_key, batch.images))
        grads, metrics = jax.grad(loss_of, has_aux=True)(state.params, batch, dropout_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    def prepared(batch: Batch) -> Batch:
        return batch if prepare is None else batch._replace(images=prepare(batch.images))

    def eval_step(params: PyTree, batch: Batch) -> Metrics:
        batch = prepared(batch)
        return _metrics(evaluation_model(params)(batch.images), batch, 0.0)

    def evaluation_model(params: PyTree) -> Any:
        model = build(params)
        model.eval()
        return model

    return Trainer(
        init,
        jax.jit(train_step, donate_argnums=0, out_shardings=(replicated, replicated)),
        jax.jit(eval_step, out_shardings=replicated),
        evaluation_model,
    )
