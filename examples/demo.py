"""What the library does, in about a minute: ``make demo``, or ``python examples/demo.py``.

1. Trains a classifier with dilated neighborhood attention on scikit-learn's handwritten digits.
2. Draws which tokens of a photograph a few chosen ones attend to, and how strongly (``out/attention.png``).
3. Times the operation beside dense masked attention and the gather formulation, and holds it against the definition.

A GPU is used where there is one.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # after the installed packages: for benchmarks.baselines, which is not installed

import flax_layers  # noqa: E402
import jax_na  # noqa: E402
from benchmarks import baselines  # noqa: E402
from flax_layers import training  # noqa: E402
from flax_layers._progress import Progress  # noqa: E402

Array = Any
SEED = 0
GOAL = 0.97


def heading(text: str) -> None:
    print(f"\n{text}\n{'─' * len(text)}", flush=True)


# --- 1. handwritten digits -------------------------------------------------------------------------------------------


class DigitClassifier(nnx.Module):
    """Images ``[B, 8, 8, 1]`` to logits: every pixel is a token, windows are 3x3, dilation alternates between 1 and 2."""

    def __init__(self, features: int = 48, depth: int = 4, *, rngs: nnx.Rngs):
        self.embed = nnx.Conv(1, features, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            flax_layers.NeighborhoodTransformerBlock(
                features,
                features // 16,
                (3, 3),
                dilation=1 + i % 2,
                relative_bias=True,
                mlp_ratio=2.0,
                rngs=rngs,
            )
            for i in range(depth)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, 10, rngs=rngs)

    def __call__(self, images: Array, *, rngs: nnx.Rngs | None = None) -> Array:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, rngs=rngs)
        return self.head(jnp.mean(self.norm(x), axis=(1, 2)))


def shifted(key: Array, images: Array) -> Array:
    """Augmentation: every image moves by up to one pixel."""
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 3)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1.0)
    return jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:]))(padded, offsets)


def train_digits(epochs: int = 18, batch_size: int = 64) -> float:
    """Accuracy on the held-out fifth."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[..., None] / 8.0 - 1.0).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target
    )
    per_epoch = len(train_x) // batch_size
    steps = epochs * per_epoch
    trainer = training.make_trainer(
        lambda: DigitClassifier(rngs=nnx.Rngs(SEED)),
        training.adamw(3e-3, steps, warmup=steps // 10),
        seed=SEED,
        label_smoothing=0.05,
        augment=shifted,
        mesh=training.data_mesh(jax.local_devices()[:1]),
    )
    state, rng, done = trainer.init(), np.random.default_rng(SEED), 0
    with Progress(steps, "training") as bar:
        for _ in range(epochs):
            order = rng.permutation(len(train_x))
            for i in range(per_epoch):
                chosen = order[i * batch_size : (i + 1) * batch_size]
                batch = training.Batch(train_x[chosen], train_y[chosen], np.ones(batch_size, np.float32))
                state, metrics = trainer.train_step(state, batch)
                done += 1
                bar.update(done, f"loss {float(metrics.loss / metrics.weight):.3f}")
    result = trainer.eval_step(state.params, training.Batch(test_x, test_y, np.ones(len(test_y), np.float32)))
    accuracy = float(result.correct / result.weight)
    print(f"{accuracy:.2%} of {len(test_y)} held-out digits are right (goal: {GOAL:.0%})")
    return accuracy


# --- 2. a photograph -------------------------------------------------------------------------------------------------

TOKEN = 5  # pixels per side of a token
WINDOW = 15
VIEWS = (
    ("plain", f"{WINDOW}×{WINDOW}", {}),
    ("dilated", f"{WINDOW}×{WINDOW}, dilation 3", {"dilation": 3}),
    ("causal", f"{WINDOW}×{WINDOW}, causal in both axes", {"is_causal": True}),
)
PLACES = (("roof", (19, 43)), ("water", (63, 76)), ("corner", (84, 0)))  # token row and column
COLORS = ("#00b4d8", "#f72585", "#ffb703")


def token_features(photo: np.ndarray) -> Array:
    """``[rows, columns, 4]``: mean colour (opponent axes) and contrast of every token, each of unit variance."""
    rows, columns = photo.shape[0] // TOKEN, photo.shape[1] // TOKEN
    patches = photo[: rows * TOKEN, : columns * TOKEN].reshape(rows, TOKEN, columns, TOKEN, 3) / 255.0
    mean = patches.mean((1, 3))
    light = mean.mean(-1)
    contrast = patches.mean(-1).std((1, 3))
    features = np.stack([light, mean[..., 0] - mean[..., 1], light - mean[..., 2], contrast], -1)
    return jnp.asarray((features - features.mean((0, 1))) / features.std((0, 1)), jnp.float32)


def attention_maps(
    features: Array, places: tuple[tuple[int, int], ...], sharpness: float = 1.2, **options: Any
) -> np.ndarray:
    """Attention weights of the chosen tokens over all tokens, ``[places, rows, columns]``.

    The score of two tokens is minus the squared distance of their features, times ``sharpness``. The output is linear in
    the values and the weights are its derivative, so one backward pass gives them: channel p of the values is place p's.
    """
    size = jnp.sum(features**2, -1, keepdims=True)
    query = jnp.concatenate([2 * sharpness * features, jnp.ones_like(size)], -1)[None, :, :, None]
    key = jnp.concatenate([features, -sharpness * size], -1)[None, :, :, None]
    value = jnp.zeros((*query.shape[:-1], len(places)))
    cotangent = np.zeros(value.shape, np.float32)
    for channel, (row, column) in enumerate(places):
        cotangent[0, row, column, 0, channel] = 1.0

    @jax.jit
    def weights(value: Array) -> Array:
        attend = functools.partial(
            jax_na.neighborhood_attention, query, key, window_size=(WINDOW, WINDOW), scale=1.0, **options
        )
        return jax.vjp(attend, value)[1](jnp.asarray(cotangent))[0]

    return np.moveaxis(np.asarray(weights(value))[0, :, :, 0], -1, 0)


def draw_attention(path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg")
    features = token_features(photo)
    rows, columns = features.shape[:2]
    photo = photo[: rows * TOKEN, : columns * TOKEN]
    # Grey and light: what is not attended to stays recognizable behind the weights.
    pale = 0.55 * np.repeat(photo.mean(-1, keepdims=True), 3, -1) / 255.0 + 0.42
    places = tuple(place for _, place in PLACES)

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11})
    figure = plt.figure(figsize=(13.2, 15.6), facecolor="white")
    grid = figure.add_gridspec(
        4, 3, height_ratios=(1.62, 1, 1, 1), hspace=0.2, wspace=0.06, left=0.055, right=0.985, top=0.945, bottom=0.05
    )
    extent = (0, columns, rows, 0)  # in tokens

    top = figure.add_subplot(grid[0, :])
    top.imshow(photo, extent=extent)
    top.set_axis_off()
    for (name, (row, column)), color in zip(PLACES, COLORS, strict=True):
        r0 = min(max(row - WINDOW // 2, 0), rows - WINDOW)
        c0 = min(max(column - WINDOW // 2, 0), columns - WINDOW)
        top.add_patch(Rectangle((c0, r0), WINDOW, WINDOW, fill=False, edgecolor=color, linewidth=2.4))
        top.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=0.8))
        top.text(
            c0 + WINDOW / 2,
            r0 - 0.8,
            name,
            color="white",
            ha="center",
            va="bottom",
            weight="bold",
            bbox={"facecolor": color, "edgecolor": "none", "boxstyle": "round,pad=0.25"},
        )
    figure.suptitle("Which tokens does a token attend to, and how strongly?", fontsize=19, weight="bold", y=0.985)
    figure.text(
        0.52,
        0.957,
        f"{rows}×{columns} tokens of {TOKEN}×{TOKEN} pixels; similar colour and contrast attract. "
        "Grey tokens are outside the window and get no weight.",
        ha="center",
        color="#444444",
    )

    colormap = plt.get_cmap("magma_r")
    for view, (title, detail, options) in enumerate(VIEWS):
        maps = attention_maps(features, places, **options)
        dilation = options.get("dilation", 1)
        side = 0.92 * (1 + 0.3 * (dilation - 1))  # dilated tokens are drawn larger than they are, to be seen
        height = WINDOW * dilation + 5
        width = min(int(height * 1.42), columns)
        for index, ((name, (row, column)), color) in enumerate(zip(PLACES, COLORS, strict=True)):
            weight = maps[index]
            seen = np.argwhere(weight > 0)
            axes = figure.add_subplot(grid[1 + index, view])
            axes.imshow(pale, extent=extent)
            for r, c in seen:
                shade = colormap(0.03 + 0.9 * float(weight[r, c] / weight.max()))
                corner = (c + (1 - side) / 2, r + (1 - side) / 2)
                axes.add_patch(Rectangle(corner, side, side, facecolor=shade, linewidth=0))
            corner = (column + (1 - side) / 2, row + (1 - side) / 2)
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=color, linewidth=2.6, clip_on=False))
            center_row, center_column = (seen.min(0) + seen.max(0)) // 2
            r0 = min(max(center_row - height // 2, 0), rows - height)
            c0 = min(max(center_column - width // 2, 0), columns - width)
            axes.set_xlim(c0, c0 + width)
            axes.set_ylim(r0 + height, r0)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_edgecolor("#bbbbbb")
            if index == 0:
                axes.set_title(title, weight="bold", fontsize=14, pad=22)
                axes.text(0.5, 1.03, detail, transform=axes.transAxes, ha="center", va="bottom", color="#444444")
            if view == 0:
                axes.set_ylabel(name, weight="bold", fontsize=14, color=color, labelpad=8)
            axes.set_xlabel(
                f"{len(seen)} tokens, largest weight {weight.max():.3f}", fontsize=9.5, color="#444444", labelpad=4
            )
    bar = figure.add_axes((0.36, 0.026, 0.28, 0.009))
    bar.imshow(np.linspace(0.03, 0.93, 256)[None], aspect="auto", cmap=colormap, vmin=0, vmax=1)
    bar.set_yticks([])
    bar.set_xticks([0, 255], ["no weight", "largest weight"])
    bar.tick_params(length=0, labelsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"{path.relative_to(ROOT)}: {len(PLACES)} tokens of a photograph, {', '.join(title for title, *_ in VIEWS)}")


# --- 3. times and errors ---------------------------------------------------------------------------------------------

PROBLEMS = (
    ("1-D  4096, window 127", (1, 4096, 4, 64), (127,)),
    ("2-D  2×56×56, window 7×7", (2, 56, 56, 4, 32), (7, 7)),
    ("2-D  64×64, window 13×13", (1, 64, 64, 4, 64), (13, 13)),
    ("3-D  8×24×24, window 3×7×7", (1, 8, 24, 24, 4, 32), (3, 7, 7)),
)


def milliseconds(function: Callable[..., Any], *inputs: Array) -> float:
    """Median time of one warm call."""
    jax.block_until_ready(function(*inputs))
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.5 and len(times) < 25):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def compare() -> None:
    device = jax.devices()[0]
    name = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    print(f"on {name}, float32, milliseconds of one forward call, warm\n")
    columns = ("jax_na", "dense", "gather", "vs dense", "vs gather", "error")
    print(f"{'problem':28s} {'served by':10s} " + " ".join(f"{column:>9s}" for column in columns))
    for name, shape, window in PROBLEMS:
        q, k, v = (jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(SEED), 3))
        ours = jax.jit(lambda q, k, v, window=window: jax_na.neighborhood_attention(q, k, v, window))
        times = [
            milliseconds(function, q, k, v)
            for function in (
                ours,
                jax.jit(functools.partial(baselines.dense_attention, window=window)),
                jax.jit(functools.partial(baselines.gather_attention, window=window)),
            )
        ]
        definition = jax.jit(
            lambda q, k, v, window=window: jax_na.neighborhood_attention(
                q, k, v, window, implementation="reference", precision="highest"
            )
        )
        error = float(jnp.max(jnp.abs(ours(q, k, v) - definition(q, k, v))))
        served = jax_na.explain(q, k, v, window).chosen
        print(
            f"{name:28s} {served:10s} {times[0]:9.2f} {times[1]:9.2f} {times[2]:9.2f} "
            f"{times[1] / times[0]:8.1f}x {times[2] / times[0]:8.1f}x {error:9.1e}",
            flush=True,
        )
    print("\nerror: largest difference from the definition (implementation='reference', precision='highest')")


def main() -> None:
    start = time.perf_counter()
    heading("1. Training a dilated neighborhood attention classifier on handwritten digits")
    accuracy = train_digits()
    heading("2. Attention over a photograph")
    draw_attention(ROOT / "out" / "attention.png")
    heading("3. Beside dense masked attention and the gather formulation")
    compare()
    print(f"\nall of it took {time.perf_counter() - start:.0f} s")
    if accuracy < GOAL:
        raise SystemExit(f"accuracy {accuracy:.2%} is below the goal of {GOAL:.0%}")


if __name__ == "__main__":
    main()
