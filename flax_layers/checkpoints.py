"""Published weights: PyTorch checkpoints under their original names and under those of Hugging Face, both directions.

``load(model, path)`` fills a model of :mod:`flax_layers.models`; ``save(model, path, layout)`` writes one that PyTorch
reads. Parameters carry the original names here, so that layout is ``kernel`` and ``scale`` renamed to ``weight`` and
transposed; the Hugging Face layout is a table of regular expressions on top. StyleNAT's first release named the biases of its head
groups otherwise (``rpb0``, ``rpb1``); it is read, and the current names are written.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_layers import _tensor_files
from flax_layers._random_state import concrete_random_state

Array = Any
Layout = Literal["original", "huggingface"]
LAYOUTS = ("original", "huggingface")

# Buffers of the PyTorch models that are no parameters.
_BUFFERS = re.compile(
    r"(^|\.)(relative_position_index|num_batches_tracked|sin_pos_embed\._float_tensor|to_rgbs\.\d+\.upsample\.kernel)$"
)
_HF_PREFIX = re.compile(r"^(dinat|nat)\.")


class CheckpointError(ValueError):
    """A checkpoint does not fit the model; the message lists everything that does not."""


class _Place(NamedTuple):
    """Where a parameter is in a checkpoint: tensors joined along their first axis, or one row of a tensor."""

    names: tuple[str, ...]
    row: int | None = None


_HF_RULES: tuple[tuple[str, tuple[str, ...], int | None], ...] = (
    (r"patch_embed\.proj\.(.*)", (r"embeddings.patch_embeddings.projection.\1",), None),
    (r"patch_embed\.norm\.(.*)", (r"embeddings.norm.\1",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.norm1\.(.*)", (r"encoder.levels.\1.layers.\2.layernorm_before.\3",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.norm2\.(.*)", (r"encoder.levels.\1.layers.\2.layernorm_after.\3",), None),
    (
        r"levels\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.(.*)",
        tuple(rf"encoder.levels.\1.layers.\2.attention.self.{name}.\3" for name in ("query", "key", "value")),
        None,
    ),
    (r"levels\.(\d+)\.blocks\.(\d+)\.attn\.rpb", (r"encoder.levels.\1.layers.\2.attention.self.rpb",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.attn\.proj\.(.*)", (r"encoder.levels.\1.layers.\2.attention.output.dense.\3",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.mlp\.fc1\.(.*)", (r"encoder.levels.\1.layers.\2.intermediate.dense.\3",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.mlp\.fc2\.(.*)", (r"encoder.levels.\1.layers.\2.output.dense.\3",), None),
    (r"levels\.(\d+)\.blocks\.(\d+)\.gamma1", (r"encoder.levels.\1.layers.\2.layer_scale_parameters",), 0),
    (r"levels\.(\d+)\.blocks\.(\d+)\.gamma2", (r"encoder.levels.\1.layers.\2.layer_scale_parameters",), 1),
    (r"levels\.(\d+)\.downsample\.(.*)", (r"encoder.levels.\1.downsample.\2",), None),
    (r"norm\.(.*)", (r"layernorm.\1",), None),
    (r"head\.(.*)", (r"classifier.\1",), None),
)


def _original_name(path: Sequence[Any]) -> str:
    *parents, leaf = map(str, path)
    return ".".join([*parents, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _place(path: Sequence[Any], layout: Layout) -> _Place:
    name = _original_name(path)
    if layout == "original":
        return _Place((name,))
    for pattern, names, row in _HF_RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return _Place(tuple(match.expand(template) for template in names), row)
    raise CheckpointError(f"parameter {name} has no name in the Hugging Face layout: it holds NAT and DiNAT models")


def _from_torch(path: Sequence[Any], tensor: np.ndarray) -> np.ndarray:
    """PyTorch's axes to Flax's: ``Linear [out, in]``, ``Conv2d [out, in, h, w]``, images ``[1, C, h, w]``."""
    if path[-1] == "kernel" and tensor.ndim == 2:
        return tensor.T
    if tensor.ndim == 4:
        return np.transpose(tensor, (2, 3, 1, 0) if path[-1] == "kernel" else (0, 2, 3, 1))
    return tensor


def _to_torch(path: Sequence[Any], array: np.ndarray) -> np.ndarray:
    if path[-1] == "kernel" and array.ndim == 2:
        return array.T
    if array.ndim == 4:
        return np.transpose(array, (3, 2, 0, 1) if path[-1] == "kernel" else (0, 3, 1, 2))
    return array


def _current_names(tensors: Mapping[str, Array], expected: set[str]) -> dict[str, Array]:
    """StyleNAT's first release: two biases ``rpb0`` and ``rpb1`` in every layer, also where all heads share a geometry."""
    current = dict(tensors)
    for name in tensors:
        stem = name.removesuffix("0")
        if name.endswith("attn.rpb0") and f"{stem}1" in tensors:
            first, second = current.pop(f"{stem}0"), current.pop(f"{stem}1")
            if f"{stem}.1" in expected:
                current |= {f"{stem}.0": first, f"{stem}.1": second}
            else:
                current[f"{stem}.0"] = np.concatenate([np.asarray(first), np.asarray(second)])
    return current


def _generator_buffers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the PyTorch generator of StyleNAT keeps beside its parameters, so that its strict ``load_state_dict`` is content."""
    buffers: dict[str, np.ndarray] = {}
    taps = np.array([1.0, 3.0, 3.0, 1.0], np.float32) / 4.0
    levels = sum(name.endswith("conv.weight") for name in tensors)
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "alpha":
            buffers[f"{stem}.sin_pos_embed._float_tensor"] = np.zeros(1, np.float32)
        elif name.endswith("conv.weight") and not name.startswith(f"to_rgbs.{levels - 1}."):
            buffers[stem.removesuffix("conv") + "upsample.kernel"] = np.outer(taps, taps)
        elif leaf == "rpb":
            length = (tensor.shape[-1] + 1) // 2
            row, column = np.divmod(np.arange(length**2), length)
            offset = (
                (row[None] - row[:, None] + length - 1) * (2 * length - 1) + column[None] - column[:, None] + length - 1
            )
            buffers[f"{stem}.relative_position_index"] = offset.astype(np.int64)
    return buffers


def detect_layout(names: Sequence[str]) -> Layout:
    """The layout of a checkpoint with these tensor names."""
    stripped = [_HF_PREFIX.sub("", name) for name in names]
    return "huggingface" if any(name.startswith(("embeddings.", "encoder.")) for name in stripped) else "original"


def _flat_parameters(model: Any) -> list[tuple[tuple[Any, ...], Any]]:
    state = nnx.state(model, nnx.Param)
    return [(tuple(path), leaf) for path, leaf in nnx.to_flat_state(state)]


def _value(leaf: Any) -> Any:
    return leaf.get_value() if hasattr(leaf, "get_value") else getattr(leaf, "value", leaf)


def from_state_dict(
    model: Any, tensors: Mapping[str, Array], *, layout: Layout | None = None, ignore: str | None = None
) -> Any:
    """The model with the parameters of a state dict.

    Args:
      model: a model of :mod:`flax_layers.models`, also an abstract one from ``nnx.eval_shape``: then nothing is
        initialized in vain.
      tensors: a state dict, name to array (anything ``numpy.asarray`` takes).
      layout: ``"original"`` or ``"huggingface"``; ``None`` looks at the names.
      ignore: a regular expression; matching parameters (original names: ``head\\.``) keep their values, and matching
        tensors of the checkpoint are not missed.

    Returns:
      A model of the same class; ``model`` is unchanged.

    Raises:
      CheckpointError: tensors are missing, left over, or of another shape; the message lists all of them.
    """
    if layout is None:
        layout = detect_layout(list(tensors))
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: expected one of {', '.join(LAYOUTS)}")
    pattern = re.compile(ignore) if ignore else None

    def ignored(name: str) -> bool:
        return bool(_BUFFERS.search(name) or (pattern and pattern.search(name)))

    given = {_HF_PREFIX.sub("", n) if layout == "huggingface" else n: t for n, t in tensors.items() if not ignored(n)}
    used: set[str] = set()
    errors: list[str] = []
    graph, state, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    if layout == "original":
        given = _current_names(given, {_original_name(path) for path, _ in nnx.to_flat_state(state)})
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        old = _value(leaf)
        name = _original_name(path)
        if ignored(name):
            if isinstance(old, jax.ShapeDtypeStruct):
                errors.append(f"{name}: ignored, but the model is abstract and has no value to keep")
            filled.append((path, leaf))
            continue
        place = _place(path, layout)
        used.update(place.names)
        missing = [source for source in place.names if source not in given]
        if missing:
            errors.extend(f"{source}: missing in the checkpoint" for source in missing)
            continue
        parts = [np.asarray(given[source]) for source in place.names]
        if place.row is not None:
            parts = [parts[0][place.row]] if parts[0].ndim == 2 and parts[0].shape[0] == 2 else parts
        try:
            array = _from_torch(path, np.concatenate(parts) if len(parts) > 1 else parts[0])
        except ValueError as error:
            errors.append(f"{', '.join(place.names)}: {error}")
            continue
        if array.shape != tuple(old.shape):
            shapes = ", ".join(str(part.shape) for part in parts)
            expected = _to_torch(path, np.empty(old.shape, np.bool_)).shape
            errors.append(
                f"{', '.join(place.names)}: shape {shapes} in the checkpoint, the model's {name} needs {expected}"
            )
            continue
        filled.append((path, leaf.replace(jnp.asarray(array, old.dtype))))
    errors.extend(f"{name}: in the checkpoint, but not in the model" for name in given if name not in used)
    if errors:
        listed = "\n  ".join(errors)
        raise CheckpointError(
            f"the checkpoint ({layout} layout, {len(tensors)} tensors) does not fit the model, {len(errors)} problems:"
            f"\n  {listed}"
        )
    return nnx.merge(graph, nnx.from_flat_state(filled), concrete_random_state(rest))


def to_state_dict(model: Any, layout: Layout = "original", *, prefix: str = "") -> dict[str, np.ndarray]:
    """The model's parameters as a PyTorch state dict.

    ``prefix`` goes before every name but the classifier's in the Hugging Face layout: ``"dinat."`` or ``"nat."`` for
    ``DinatForImageClassification`` or ``NatForImageClassification``, nothing for ``DinatModel``.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown: expected one of {', '.join(LAYOUTS)}")
    tensors: dict[str, np.ndarray] = {}
    rows: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in _flat_parameters(model):
        array = _to_torch(path, np.asarray(_value(leaf)))
        names, row = _place(path, layout)
        if layout == "huggingface":
            names = tuple(name if name.startswith("classifier.") else prefix + name for name in names)
        if row is not None:
            rows.setdefault(names[0], {})[row] = array
            continue
        for name, part in zip(names, np.split(array, len(names)) if len(names) > 1 else [array], strict=True):
            tensors[name] = np.array(part, order="C")
    for name, parts in rows.items():
        tensors[name] = np.stack([parts[row] for row in sorted(parts)])
    return tensors | (_generator_buffers(tensors) if "input.input" in tensors else {})


def load(model: Any, path: str | pathlib.Path, *, layout: Layout | None = None, ignore: str | None = None) -> Any:
    """:func:`from_state_dict` of a file: ``.safetensors``, ``.bin``, ``.pth``, or a folder of the Hugging Face hub.

    Archives of ``torch.save`` are read without PyTorch.
    """
    return from_state_dict(model, _tensor_files.read(path), layout=layout, ignore=ignore)


def save(model: Any, path: str | pathlib.Path, layout: Layout = "original", *, prefix: str = "") -> None:
    """Write :func:`to_state_dict` to ``.safetensors``, or with PyTorch installed to an archive for ``torch.load``."""
    _tensor_files.write(path, to_state_dict(model, layout, prefix=prefix))


def load_pretrained(
    make_model: Callable[[], Any], path: str | pathlib.Path, *, layout: Layout | None = None, ignore: str | None = None
) -> Any:
    """:func:`load` into ``make_model()``, ``lambda: models.create("dinat_tiny", rngs=nnx.Rngs(0))``, not initializing it."""
    model = make_model() if ignore else nnx.eval_shape(make_model)
    return load(model, path, layout=layout, ignore=ignore)
