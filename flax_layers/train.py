"""Train any registered classifier: ``python -m flax_layers.train --model dinat_mini --data images/ --out runs/mini``.

Data is a folder per class or an ``.npz`` of arrays (:func:`flax_layers._data.load`). Parameters are float32, the computation
bfloat16 on GPUs; batches are split over all local devices. A run that was stopped goes on from its last checkpoint when the same
command is given again, with the same order of images and the same random numbers.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_layers import _data, checkpoints, models, training
from flax_layers._progress import Progress

Array = Any
# Of ImageNet, as the published models expect; other channel counts use 0.5.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Arguments that a resumed run may change.
_FREE = {"out", "workers", "save_every", "stop_after", "implementation"}


def _override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected name=value, such as window_size=5")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flax_layers.train", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    classifiers = [name for name in models.names() if not name.startswith("stylenat")]
    add("--model", required=True, choices=classifiers, metavar="NAME", help=f"one of {', '.join(classifiers)}")
    add("--data", required=True, help="a folder with train/ and val/, each with a folder per class, or a .npz of arrays")
    add("--out", required=True, type=pathlib.Path, help="folder for checkpoints, log and final weights")
    add("--image-size", type=int, default=None, help="side of the square images (default: 224, or that of the arrays)")
    add("--epochs", type=int, default=300)
    add("--batch", type=int, default=128, help="images per step, over all devices")
    add("--lr", type=float, default=None, help="peak learning rate (default: 1e-3 per 1024 images of a batch)")
    add("--warmup", type=float, default=20.0, help="epochs of linear warm-up")
    add("--weight-decay", type=float, default=0.05)
    add("--label-smoothing", type=float, default=0.1)
    add("--dtype", choices=("bfloat16", "float32"), default=None, help="of the computation (default: bfloat16 on GPUs)")
    add("--implementation", default=None, help="of the attention; default: the best that serves")
    add("--remat", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    add("--weights", default=None, help="start from published weights (.safetensors, .bin, .pth)")
    add(
        "--set",
        type=_override,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override an entry of the model's config",
    )
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=8, help="threads that decode images")
    add("--save-every", type=int, default=1000, help="steps between checkpoints (there is one after every epoch, too)")
    add("--stop-after", type=int, default=None, help="stop, resumable, after so many steps of this process")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch", "workers", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be at least 1")
    return args


def normalizer(channels: int) -> Callable[[Array], Array]:
    """uint8 images to float32 of about zero mean and unit variance, on the device."""
    mean, std = (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.5,) * channels)

    def prepare(images: Array) -> Array:
        return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)

    return prepare


def _check_resumable(out: pathlib.Path, args: argparse.Namespace) -> None:
    """Keep the arguments beside the checkpoints, and refuse to go on with others."""
    chosen = {name: value for name, value in vars(args).items() if name not in _FREE}
    chosen = json.loads(json.dumps(chosen, default=str))
    path = out / "arguments.json"
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [
            f"{name}: {before.get(name)!r} then, {value!r} now"
            for name, value in chosen.items()
            if before.get(name) != value
        ]
        if changed:
            raise SystemExit(f"{out} holds a run with other arguments: {'; '.join(changed)}. Choose another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chosen, indent=2) + "\n")


def evaluate(
    trainer: training.Trainer, params: Any, dataset: _data.Dataset, batch_size: int, put: Any, workers: int
) -> float:
    """Accuracy on all images of a dataset."""
    total = None
    for batch in _data.evaluation_batches(dataset, batch_size, workers=workers):
        metrics = trainer.eval_step(params, put(batch))
        total = metrics if total is None else total + metrics
    assert total is not None
    return float(total.correct / total.weight)


def main(argv: Sequence[str] | None = None) -> float | None:
    """Run the command; returns the last held-out accuracy, if images are held out."""
    import orbax.checkpoint as ocp

    args = parse(argv)
    mesh = training.data_mesh()
    devices = mesh.devices.size
    if args.batch % devices:
        raise SystemExit(f"--batch {args.batch} cannot be split over {devices} devices: use a multiple of {devices}")
    train, held_out = _data.load(args.data, args.image_size)
    per_epoch = len(train) // args.batch
    if not per_epoch:
        raise SystemExit(f"--batch {args.batch} exceeds the {len(train)} training images")
    _check_resumable(args.out, args)
    steps = args.epochs * per_epoch
    platform = mesh.devices.flat[0].platform
    dtype = args.dtype or ("bfloat16" if platform in ("gpu", "cuda", "rocm", "tpu") else "float32")
    channels = train.shape[-1]

    def make_model() -> Any:
        overrides = {"num_classes": len(train.classes), "in_channels": channels} | dict(args.set)
        return models.create(
            args.model,
            dtype=jnp.dtype(dtype),
            implementation=args.implementation,
            remat=args.remat,
            rngs=nnx.Rngs(args.seed),
            **overrides,
        )

    peak = args.lr if args.lr is not None else 1e-3 * args.batch / 1024
    warmup = min(int(args.warmup * per_epoch), steps // 5)
    trainer = training.make_trainer(
        make_model,
        training.adamw(peak, steps, warmup=warmup, weight_decay=args.weight_decay),
        seed=args.seed,
        label_smoothing=args.label_smoothing,
        prepare=normalizer(channels),
        mesh=mesh,
    )
    manager = ocp.CheckpointManager(
        (args.out / "checkpoints").resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=3)
    )
    state = trainer.init()
    first = manager.latest_step() or 0
    if first:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = manager.restore(first, args=ocp.args.StandardRestore(abstract))
    elif args.weights:
        loaded = checkpoints.load(trainer.model(state.params), args.weights, ignore=r"^(head|classifier)\.")
        params = nnx.to_pure_dict(nnx.state(loaded, nnx.Param))
        state = state._replace(
            params=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    print(
        f"{args.model}: {count:,} parameters, {dtype} on {devices} x {mesh.devices.flat[0].device_kind}; {len(train)} images of "
        f"{'x'.join(map(str, train.shape))} in {len(train.classes)} classes; steps {first} to {steps}",
        flush=True,
    )

    def put(batch: training.Batch) -> training.Batch:
        return jax.device_put(batch, training.data_sharding(mesh))

    def save(step: int) -> None:
        if manager.latest_step() != step:
            manager.save(step, args=ocp.args.StandardSave(state))

    accuracy, last = None, steps if args.stop_after is None else min(steps, first + args.stop_after)
    batches = _data.training_batches(train, args.batch, seed=args.seed, first_step=first, steps=last, workers=args.workers)
    recent: list[training.Metrics] = []
    mark = time.perf_counter()
    with Progress(steps, "training") as bar, (args.out / "log.jsonl").open("a") as log:
        for step, batch in enumerate(batches, first + 1):
            state, metrics = trainer.train_step(state, put(batch))
            recent.append(metrics)
            epoch_ends = step % per_epoch == 0
            if len(recent) == 50 or epoch_ends or step == last:
                # Reading the metrics waits for the device: the time is that of finished steps.
                total = jax.tree.map(float, sum(recent[1:], recent[0]))
                rate = len(recent) * args.batch / (time.perf_counter() - mark)
                entry = {"step": step, "loss": total.loss / total.weight, "accuracy": total.correct / total.weight}
                log.write(json.dumps(entry | {"images_per_second": round(rate, 1)}) + "\n")
                log.flush()
                held = "" if accuracy is None else f"  held out {accuracy:.2%}"
                bar.update(step, f"loss {entry['loss']:.3f}  {entry['accuracy']:.1%}{held}  {rate:.0f} images/s")
                recent, mark = [], time.perf_counter()
            if epoch_ends and held_out is not None:
                accuracy = evaluate(trainer, state.params, held_out, args.batch, put, args.workers)
                log.write(json.dumps({"step": step, "held_out_accuracy": accuracy}) + "\n")
                log.flush()
            if step % args.save_every == 0 or epoch_ends or step == last:
                save(step)
                mark = time.perf_counter()
    manager.wait_until_finished()
    manager.close()
    if last == steps:
        weights = args.out / "weights.safetensors"
        checkpoints.save(trainer.model(jax.tree.map(np.asarray, state.params)), weights)
        print(f"weights: {weights}")
        if held_out is not None:
            # A resumed run may have had nothing left to do, and so no evaluation.
            if accuracy is None:
                accuracy = evaluate(trainer, state.params, held_out, args.batch, put, args.workers)
            print(f"{accuracy:.2%} of {len(held_out)} held-out images are right")
    return accuracy


if __name__ == "__main__":
    main()
