"""A whole model: training and inference images per second with each implementation of the attention.

    python -m benchmarks.dinat [--model dinat_tiny] [--batch 128] [--output results.json]

DiNAT-tiny at 224 px, batch 128, bfloat16 computation with float32 parameters. All programs are compiled first, together; then each
is timed by itself, warm, with random images and weights that lie on the device. Programs can also be exported on a machine
without a GPU (``--export FOLDER``) and timed elsewhere (``--programs FOLDER``), where only XLA's compiler is then waited for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

import jax_na

Array = Any
IMPLEMENTATIONS = ("cuda", "cuda_gemm", "cuda_naive", "xla")
KINDS = ("inference", "training")
CLASSES = 1000


def export_programs(args: argparse.Namespace, platform: str) -> tuple[dict[tuple[str, str], export.Exported], list[Any]]:
    """Every program over flat lists of arrays, and the names, shapes and dtypes of a training state's leaves, parameters first."""
    from flax import nnx

    from flax_layers import models, training

    programs = {}
    leaves: list[Any] = []
    images = jax.ShapeDtypeStruct((args.batch, args.size, args.size, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((args.batch,), jnp.int32)
    for name in args.implementations:
        trainer = training.make_trainer(
            lambda name=name: models.create(args.model, implementation=name, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
            training.adamw(1e-3, 1000, warmup=10),
            label_smoothing=0.1,
            mesh=training.data_mesh(jax.local_devices()[:1]),
        )
        state = jax.eval_shape(trainer.init)
        flat, tree = jax.tree.flatten(state)
        flat_params, tree_params = jax.tree.flatten(state.params)

        def train(flat: list[Array], images: Array, labels: Array, tree: Any = tree, trainer: Any = trainer) -> Any:
            batch = training.Batch(images, labels, jnp.ones(labels.shape, jnp.float32))
            state, metrics = trainer.train_step(jax.tree.unflatten(tree, flat), batch)
            return jax.tree.leaves(state), metrics.loss

        def infer(flat: list[Array], images: Array, tree: Any = tree_params, trainer: Any = trainer) -> Array:
            return trainer.model(jax.tree.unflatten(tree, flat))(images)

        options: dict[str, Any] = {"platforms": [platform], "disabled_checks": list(jax_na.EXPORT_SAFETY_CHECKS)}
        for kind, function, arguments in (
            ("inference", infer, (flat_params, images)),
            ("training", train, (flat, images, labels)),
        ):
            try:
                programs[name, kind] = export.export(jax.jit(function), **options)(*arguments)
            except NotImplementedError as error:
                print(f"{name} cannot serve {kind}: {error}", flush=True)
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        leaves = [[path, list(leaf.shape), str(leaf.dtype)] for path, leaf in zip(paths, flat, strict=True)]
        print(f"traced {name}", flush=True)
    return programs, leaves


def write(folder: pathlib.Path, programs: dict[tuple[str, str], export.Exported], leaves: list[Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (name, kind), program in programs.items():
        (folder / f"{name}.{kind}").write_bytes(bytes(program.serialize()))
    (folder / "leaves.json").write_text(json.dumps(leaves))


def read(folder: pathlib.Path, implementations: list[str]) -> tuple[dict[tuple[str, str], export.Exported], list[Any]]:
    programs = {
        (name, kind): export.deserialize(bytearray((folder / f"{name}.{kind}").read_bytes()))
        for name in implementations
        for kind in KINDS
        if (folder / f"{name}.{kind}").is_file()
    }
    return programs, json.loads((folder / "leaves.json").read_text())


def initial_state(leaves: list[Any]) -> tuple[list[Array], list[int]]:
    """Arrays like those of a fresh training state, and which of them are the parameters."""
    rng, arrays, parameters = np.random.default_rng(0), [], []
    for index, (path, shape, dtype) in enumerate(leaves):
        value = np.zeros(shape, dtype)
        if path.startswith(".params"):
            parameters.append(index)
            if "scale" in path:
                value = np.ones(shape, dtype)
            elif "kernel" in path or "rpb" in path:
                value = (rng.standard_normal(shape) * 0.02).astype(dtype)
        arrays.append(jnp.asarray(value))
    return arrays, parameters


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


def compile_all(
    programs: dict[tuple[str, str], export.Exported], seconds: float, errors: dict[tuple[str, str], str]
) -> dict[tuple[str, str], Any]:
    """Compiled programs; those that fail or take too long are in ``errors``."""
    pool = concurrent.futures.ThreadPoolExecutor(16)

    def compiled(program: export.Exported, kind: str) -> Any:
        arguments = jax.tree.unflatten(program.in_tree, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals])
        donated = (0,) if kind == "training" else ()
        return jax.jit(program.call, donate_argnums=donated).lower(*arguments[0]).compile()

    start = time.perf_counter()
    waiting = {key: pool.submit(compiled, program, key[1]) for key, program in programs.items()}
    done = {}
    for key, future in waiting.items():
        try:
            done[key] = future.result(max(0.1, seconds - (time.perf_counter() - start)))
        except concurrent.futures.TimeoutError:
            errors[key] = f"not compiled within {seconds:.0f} s"
        except Exception as error:
            errors[key] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    print(f"compiled {len(done)} of {len(programs)} programs in {time.perf_counter() - start:.0f} s", flush=True)
    return done


def measure(
    args: argparse.Namespace, programs: dict[tuple[str, str], export.Exported], leaves: list[Any]
) -> dict[str, Any]:
    errors: dict[tuple[str, str], str] = {}
    compiled = compile_all(programs, args.compile_seconds, errors)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((args.batch, args.size, args.size, 3)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, CLASSES, args.batch), jnp.int32)
    arrays, parameters = initial_state(leaves)
    rows, logits = [], {}
    for (name, kind), program in compiled.items():
        try:
            if kind == "inference":
                flat = [arrays[i] for i in parameters]
                logits[name] = np.asarray(program(flat, images), np.float32)
                value, spread = rate(lambda program=program, flat=flat: program(flat, images), args.batch, args.seconds)
            else:
                held = [jnp.copy(array) for array in arrays]  # donated to the step

                def step(program: Any = program, holder: list[Any] = [held]) -> Any:  # noqa: B006
                    holder[0], loss = program(holder[0], images, labels)
                    return loss

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
            errors[name, kind] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    found = {(row["implementation"], row["pass"]): row["images_per_second"] for row in rows}
    print(f"\n{'implementation':15s} " + " ".join(f"{kind:>12s}" for kind in KINDS) + "  images/s")
    for name in args.implementations:
        cells = (found.get((name, kind)) for kind in KINDS)
        print(f"{name:15s} " + " ".join(f"{'-' if cell is None else f'{cell:.0f}':>12s}" for cell in cells))
    for (name, kind), error in errors.items():
        print(f"{name}, {kind}: {error}")
    reference = logits.get("xla", logits.get("cuda_naive"))
    for name, values in logits.items() if reference is not None else ():
        error = float(np.abs(values - reference).max() / np.abs(reference).max())
        print(
            f"logits of {name}: largest difference from {'xla' if 'xla' in logits else 'cuda_naive'} {error:.1e} of the largest"
        )
    return {
        "gpu": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
        "rows": rows,
        "errors": {", ".join(key): error for key, error in errors.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinat_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per program")
    parser.add_argument("--compile-seconds", type=float, default=600.0, help="how long to wait for XLA's compiler")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument(
        "--export", type=pathlib.Path, default=None, help="write the programs for CUDA to a folder, and stop"
    )
    parser.add_argument("--programs", type=pathlib.Path, default=None, help="read the programs from a folder")
    parser.add_argument("--output", type=pathlib.Path, default=None)
    args = parser.parse_args()
    if args.export is not None:
        write(args.export, *export_programs(args, "cuda"))
        return
    device = jax.devices()[0]
    print(
        f"{args.model}, {args.size} px, batch {args.batch}, bfloat16, on {device.device_kind}; {jax_na.cuda_status()}",
        flush=True,
    )
    platform = "cuda" if device.platform == "gpu" else device.platform
    given = read(args.programs, args.implementations) if args.programs else export_programs(args, platform)
    result = measure(args, *given)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # a compilation that took too long may still run


if __name__ == "__main__":
    main()
