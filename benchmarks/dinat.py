"""A whole model: training and inference images per second with each implementation of the attention.

    python -m benchmarks.dinat [--model dinat_tiny] [--batch 128] [--output results.json]

DiNAT-tiny at 224 px, batch 128, bfloat16 computation; float32 parameters in training, bfloat16 ones in inference. Every program is
compiled in a process of its own, all at once; then each is timed by itself, warm, with random images and weights that lie on the
device. Programs can also be exported on a machine without a GPU (``--export FOLDER``) and timed elsewhere (``--programs FOLDER``),
where only XLA's compiler is then waited for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
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


def export_programs(args: argparse.Namespace) -> tuple[dict[tuple[str, str], export.Exported], list[Any]]:
    """Every program over flat lists of arrays, and the names, shapes and dtypes of a training state's leaves, parameters first."""
    from flax import nnx

    from flax_layers import models, training

    programs = {}
    leaves: list[Any] = []
    images = jax.ShapeDtypeStruct((args.batch, args.size, args.size, 3), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((args.batch,), jnp.int32)
    half = jnp.bfloat16

    def make(name: str, **options: Any) -> Any:
        return models.create(args.model, implementation=name, dtype=half, rngs=nnx.Rngs(0), **options)

    for name in args.implementations:
        trainer = training.make_trainer(
            lambda name=name: make(name),
            training.adamw(1e-3, 1000, warmup=10),
            label_smoothing=0.1,
            mesh=training.data_mesh(jax.local_devices()[:1]),
        )
        state = jax.eval_shape(trainer.init)
        flat, tree = jax.tree.flatten(state)
        server = nnx.eval_shape(lambda name=name: make(name, param_dtype=half, drop_path_rate=0.0))
        graph, params = nnx.split(server)
        flat_params, tree_params = jax.tree.flatten(nnx.to_pure_dict(params))

        def train(flat: list[Array], images: Array, labels: Array, tree: Any = tree, trainer: Any = trainer) -> Any:
            batch = training.Batch(images, labels, jnp.ones(labels.shape, jnp.float32))
            state, metrics = trainer.train_step(jax.tree.unflatten(tree, flat), batch)
            return jax.tree.leaves(state), metrics.loss

        def infer(flat: list[Array], images: Array, tree: Any = tree_params, graph: Any = graph) -> Array:
            return nnx.merge(graph, jax.tree.unflatten(tree, flat))(images)

        options: dict[str, Any] = {"platforms": ["cuda"], "disabled_checks": list(jax_na.EXPORT_SAFETY_CHECKS)}
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


def serve(args: argparse.Namespace, folder: pathlib.Path, name: str, kind: str) -> None:
    """A child process: compile one program, say so, wait for a line, time it, print the row."""
    program = export.deserialize(bytearray((folder / f"{name}.{kind}").read_bytes()))
    (flat, *rest), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (flat, *rest))
    donated = (0,) if kind == "training" else ()
    compiled = jax.jit(program.call, donate_argnums=donated).lower(*abstract).compile()
    print("compiled", flush=True)
    if not sys.stdin.readline():
        return  # the parent has gone
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((args.batch, args.size, args.size, 3)), jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, CLASSES, args.batch), jnp.int32)
    arrays, parameters = initial_state(json.loads((folder / "leaves.json").read_text()))
    if kind == "inference":
        held = [arrays[i].astype(aval.dtype) for i, aval in zip(parameters, flat, strict=True)]
        np.save(folder / f"{name}.npy", np.asarray(compiled(held, images), np.float32))

        def step() -> Any:
            return compiled(held, images)
    else:
        state = [jnp.copy(array) for array in arrays]  # donated to the step

        def step() -> Any:
            nonlocal state
            state, loss = compiled(state, images, labels)
            return loss

    value, spread = rate(step, args.batch, args.seconds)
    memory = compiled.memory_analysis()
    row = {
        "model": args.model,
        "image_size": args.size,
        "batch": args.batch,
        "implementation": name,
        "pass": kind,
        "images_per_second": round(value, 1),
        "spread": round(spread, 3),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2) if memory else None,
    }
    print(json.dumps(row), flush=True)


def measure(args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Rows of all programs in the folder, and why there is none for the others."""
    start = time.perf_counter()
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    children, errors, rows = {}, {}, []
    for name in args.implementations:
        for kind in KINDS:
            if (folder / f"{name}.{kind}").is_file():
                command = [sys.executable, "-m", "benchmarks.dinat", *sys.argv[1:], "--programs", str(folder)]
                children[name, kind] = subprocess.Popen(
                    [*command, "--serve", name, kind],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
    with concurrent.futures.ThreadPoolExecutor(len(children) or 1) as pool:

        def line(key: tuple[str, str], seconds: float) -> str | None:
            """The child's next line; ``None`` if there is none in time, and the child is ended."""
            try:
                text = pool.submit(children[key].stdout.readline).result(max(0.1, seconds))  # type: ignore[union-attr]
            except concurrent.futures.TimeoutError:
                errors[key] = f"no answer within {seconds:.0f} s"
            else:
                if text:
                    return text.strip()
                errors[key] = f"the process ended with {children[key].wait()}"
            children[key].kill()
            return None

        ready = [key for key in children if line(key, args.compile_seconds - (time.perf_counter() - start)) == "compiled"]
        print(f"compiled {len(ready)} of {len(children)} programs in {time.perf_counter() - start:.0f} s", flush=True)
        for key in ready:
            children[key].stdin.write("go\n")  # type: ignore[union-attr]
            children[key].stdin.flush()  # type: ignore[union-attr]
            if (text := line(key, 60 + 10 * args.seconds)) is not None:
                print(text, flush=True)
                rows.append(json.loads(text))
            children[key].wait()
    report(args, rows, errors, folder)
    return {
        "versions": {"jax": jax.__version__},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "rows": rows,
        "errors": {", ".join(key): error for key, error in errors.items()},
    }


def report(
    args: argparse.Namespace, rows: list[dict[str, Any]], errors: dict[tuple[str, str], str], folder: pathlib.Path
) -> None:
    found = {(row["implementation"], row["pass"]): row["images_per_second"] for row in rows}
    print(f"\n{'implementation':15s} " + " ".join(f"{kind:>12s}" for kind in KINDS) + "  images/s")
    for name in args.implementations:
        cells = (found.get((name, kind)) for kind in KINDS)
        print(f"{name:15s} " + " ".join(f"{'-' if cell is None else f'{cell:.0f}':>12s}" for cell in cells))
    for (name, kind), error in errors.items():
        print(f"{name}, {kind}: {error}")
    logits = {name: np.load(path) for name in args.implementations if (path := folder / f"{name}.npy").is_file()}
    for name, values in logits.items():
        reference = next(iter(reversed(logits)))
        error = float(np.abs(values - logits[reference]).max() / np.abs(logits[reference]).max())
        print(f"logits of {name}: largest difference from {reference} {error:.1e} of the largest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dinat_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing per program")
    parser.add_argument("--compile-seconds", type=float, default=600.0, help="how long to wait for XLA's compiler")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--export", type=pathlib.Path, help="write the programs for CUDA to a folder, and stop")
    parser.add_argument("--programs", type=pathlib.Path, help="read the programs from a folder")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args, args.programs, *args.serve)
        return
    if args.export is not None:
        write(args.export, *export_programs(args))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.programs
        if folder is None:
            folder = pathlib.Path(temporary)
            write(folder, *export_programs(args))
        device = subprocess.run(
            [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"], stdout=subprocess.PIPE, text=True
        ).stdout.strip()
        print(
            f"{args.model}, {args.size} px, batch {args.batch}, bfloat16, on {device}; {jax_na.cuda_status()}", flush=True
        )
        result = {"gpu": device} | measure(args, folder)
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
