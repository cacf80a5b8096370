"""Reading and writing tensor files: safetensors, and without PyTorch its zip archives (``.bin``, ``.pth``, ``.pt``).

Sources: the safetensors format description; the layout that ``torch.save`` writes since PyTorch 1.6. Archives are read by
an unpickler that knows tensors and plain containers and puts a dead mark for everything else (a training script's arguments beside
the weights, say), so a file cannot run code; where a mark stands for weights, the file is refused.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

StateDict = dict[str, np.ndarray]

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
_STORAGE_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# Dictionaries that training scripts wrap a state dict in.
_WRAPPERS = ("state_dict", "state_dicts", "model", "model_ema", "g_ema")


def read(path: str | pathlib.Path) -> StateDict:
    """Tensors by name, from ``.safetensors``, a PyTorch archive, or a folder that holds one of the usual file names."""
    path = pathlib.Path(path)
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return read(path / name)
        raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write ``.safetensors``, or with PyTorch installed an archive for ``torch.load`` (any other suffix)."""
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        _write_safetensors(path, tensors)
        return
    try:
        import torch
    except ImportError:
        raise ImportError(f"writing {path.name} needs PyTorch; '.safetensors' does not") from None
    torch.save({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}, path)


def _read_safetensors(path: pathlib.Path) -> StateDict:
    data = path.read_bytes()
    if len(data) < 8:
        raise ValueError(f"{path} is no safetensors file: it has {len(data)} bytes")
    (size,) = struct.unpack("<Q", data[:8])
    if size > len(data) - 8:
        raise ValueError(f"{path} is no safetensors file, or cut short: its header claims {size} bytes")
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
        begin, end = entry["data_offsets"]
        raw = data[8 + size + begin : 8 + size + end]
        tensors[name] = np.frombuffer(raw, _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset, chunks = 0, []
    for name, tensor in tensors.items():
        array = np.asarray(tensor, order="C")
        if array.dtype not in _SAFETENSORS_NAMES:
            raise TypeError(f"tensor {name} has dtype {array.dtype}, which safetensors files do not hold")
        chunk = array.tobytes()
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        offset += len(chunk)
        chunks.append(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


class _Foreign:
    """Stands for an object of a class that is not read: takes what the pickle gives it and forgets it."""

    origin = ""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> _Foreign:
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = append


class _Unpickler(pickle.Unpickler):
    """Tensors as numpy arrays in plain containers; of everything else only the name of its class."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, requires_grad, hooks: data
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if module == "torch" and name in _STORAGE_DTYPES:
            return np.dtype(_STORAGE_DTYPES[name])
        return type(name, (_Foreign,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"the archive holds a persistent object of kind {kind!r}, expected 'storage'")
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), dtype, count)


def _rebuild_tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    strides = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False)


def _read_torch(path: pathlib.Path) -> StateDict:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is neither .safetensors nor a zip archive of torch.save (PyTorch before 1.6 wrote another format: "
            "load and save it again with a current PyTorch)"
        )
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path} is no archive of torch.save: it holds no data.pkl")
        root = pickles[0].removesuffix("/data.pkl")
        content = _Unpickler(io.BytesIO(archive.read(pickles[0])), archive, root).load()
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    for part in (content, *content.values()) if isinstance(content, dict) else (content,):
        if isinstance(part, _Foreign):
            raise ValueError(
                f"{path} refers to {part.origin}: only tensors in plain containers are read. Save the state dict alone: "
                "torch.save(model.state_dict(), path)"
            )
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    return {name.removeprefix("module."): tensor for name, tensor in content.items() if isinstance(tensor, np.ndarray)}
