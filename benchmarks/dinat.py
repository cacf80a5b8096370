"""A whole model: training and inference images per second with each implementation of the attention.

    python -m benchmarks.dinat [--model dinat_tiny] [--batch 128] [--output results.json]

DiNAT-tiny at 224 px, batch 128, bfloat16 computation with float32 parameters. All programs are compiled first, together; then each
is timed by itself, warm, with random images that lie on the device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_na
from flax_layers import models, training

Array = Any
IMPLEMENTATIONS = ("cuda", "cuda_gemm", "cuda_naive", "xla")


def build(name: str, implementation: str | None, batch: training.Batch, classes: int) -> dict[str, Any]:
    """Lower the training and the inference program of one implementation."""
    trainer = training.make_trainer(
        lambda: models.create(
            name,
            implementation=implementation,
            dtype=jnp.bfloat16,
            num_classes=classes,
            drop_path_rate=0.2,
            rngs=nnx.Rngs(0),
        ),
        training.adamw(1e-3, 1000, warmup=10),
        label_smoothing=0.1,
        mesh=training.data_mesh(jax.local_devices()[:1]),
    )
    state = jax.eval_shape(trainer.init)
    infer = jax.jit(lambda params, images: trainer.model(params)(images))
    return {
        "trainer": trainer,
        "inference": infer.lower(state.params, batch.images),
        "training": trainer.train_step.lower(state, batch),
    }


def rate(step: Any, images: int, seconds: float) -> tuple[float, float]:
    """Images per second, the median and the spread (largest over smallest) of five runs of a few steps each."""
    jax.block_until_ready(step())
    start = time.perf_counter()
    jax.block_until_ready(step())
    repeats = max(2, int(seconds / 5 / (time.perf_counter() - start)))
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            result = step()
        jax.block_until_ready(result)
        rates.append(repeats * images / (time.perf_counter() - start))
    return statistics.median(rates), max(rates) / min(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinat_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per program")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--output", type=pathlib.Path, default=None)
    args = parser.parse_args()
    classes = 1000
    rng = np.random.default_rng(0)
    batch = training.Batch(
        jnp.asarray(rng.standard_normal((args.batch, args.size, args.size, 3)), jnp.bfloat16),
        jnp.asarray(rng.integers(0, classes, args.batch), jnp.int32),
        jnp.ones(args.batch, jnp.float32),
    )
    device = jax.devices()[0]
    print(
        f"{args.model}, {args.size} px, batch {args.batch}, bfloat16, on {device.device_kind}; {jax_na.cuda_status()}",
        flush=True,
    )
    start = time.perf_counter()
    compiled: dict[tuple[str, str], Any] = {}
    trainers, errors = {}, {}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        waiting = {}
        for name in args.implementations:
            try:
                programs = build(args.model, name, batch, classes)
            except Exception as error:
                traceback.print_exc()
                errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            trainers[name] = programs.pop("trainer")
            waiting |= {(name, kind): pool.submit(lowered.compile) for kind, lowered in programs.items()}
            print(f"lowered {name} after {time.perf_counter() - start:.0f} s", flush=True)
        for key, future in waiting.items():
            try:
                compiled[key] = future.result()
            except Exception as error:
                traceback.print_exc()
                errors[key[0]] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"compiled {len(compiled)} programs in {time.perf_counter() - start:.0f} s", flush=True)

    if not compiled:
        raise SystemExit("nothing could be compiled")
    initial = next(iter(trainers.values())).init()
    rows, logits = [], {}
    for (name, kind), program in compiled.items():
        try:
            state = jax.tree.map(jnp.copy, initial)  # the training step donates it
            if kind == "inference":
                logits[name] = np.asarray(program(state.params, batch.images), np.float32)
                value, spread = rate(
                    lambda program=program, state=state: program(state.params, batch.images), args.batch, args.seconds
                )
            else:
                holder = [state]

                def step(program: Any = program, holder: list[Any] = holder) -> Any:
                    holder[0], metrics = program(holder[0], batch)
                    return metrics

                value, spread = rate(step, args.batch, args.seconds)
            memory = program.memory_analysis()
            rows.append(
                {
                    "model": args.model,
                    "image_size": args.size,
                    "batch": args.batch,
                    "implementation": name,
                    "pass": kind,
                    "images_per_second": round(value, 1),
                    "spread": round(spread, 3),
                    "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2) if memory else None,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    print(f"\n{'implementation':15s} {'inference':>12s} {'training':>12s}  images/s")
    found = {(row["implementation"], row["pass"]): row["images_per_second"] for row in rows}
    for name in args.implementations:
        cells = (found.get((name, kind)) for kind in ("inference", "training"))
        print(
            f"{name:15s} " + " ".join(f"{'-' if cell is None else f'{cell:.0f}':>12s}" for cell in cells),
            errors.get(name, ""),
        )
    if "xla" in logits:
        for name, values in logits.items():
            error = np.abs(values - logits["xla"]).max() / np.abs(logits["xla"]).max()
            print(f"logits of {name}: largest difference from xla {error:.1e} of the largest logit")
    if args.output is not None:
        result = {"gpu": device.device_kind, "versions": {"jax": jax.__version__}, "rows": rows, "errors": errors}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
