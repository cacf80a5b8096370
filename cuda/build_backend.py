"""The PEP 517 build backend: scikit-build-core, with or without the CUDA lane.

One switch, ``pip install . -Ccmake.define.JAX_NA_CUDA=AUTO|ON|OFF`` (or the environment variable ``JAX_NA_CUDA``):

- ``AUTO`` (the default): build the CUDA lane if there is an nvcc;
- ``ON``: build it, and fail if there is no nvcc;
- ``OFF``: do not.

Without the CUDA lane the wheel is pure Python (``py3-none-any``) and needs neither CMake nor jaxlib to build. With it, the build
asks for the oldest jaxlib whose runtime the extension is to load in: a handler loads only where the runtime's FFI API is at least
that of the headers it was compiled with.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from scikit_build_core import build as _backend

FFI_HEADERS = "jaxlib==0.10.1"
SWITCH = "JAX_NA_CUDA"
Settings = dict[str, Any] | None


def find_nvcc(settings: Settings = None) -> str | None:
    """The nvcc that CMake would take."""
    named = (settings or {}).get("cmake.define.CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX")
    if named:
        return shutil.which(named)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


def wants_cuda(settings: Settings) -> bool:
    """Whether CMake has work to do. ``ON`` without nvcc goes on to CMake, which says how to mend it."""
    key = f"cmake.define.{SWITCH}"
    switch = str((settings or {}).get(key, os.environ.get(SWITCH, "AUTO"))).upper()
    if switch not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{SWITCH}={switch!r}: expected AUTO, ON or OFF")
    return switch == "ON" or (switch == "AUTO" and find_nvcc(settings) is not None)


def _settings(settings: Settings) -> dict[str, Any]:
    result = dict(settings or {})
    if wants_cuda(settings):
        key = f"cmake.define.{SWITCH}"
        result.setdefault(key, os.environ.get(SWITCH, "AUTO"))
        nvcc = find_nvcc(settings)
        if nvcc is not None:
            result.setdefault("cmake.define.CMAKE_CUDA_COMPILER", nvcc)
    else:
        result.update({"wheel.cmake": "false", "wheel.platlib": "false", "wheel.py-api": "py3"})
    return result


def _requires(requires: list[str], settings: Settings) -> list[str]:
    return [*requires, FFI_HEADERS] if wants_cuda(settings) else requires


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return _requires(_backend.get_requires_for_build_wheel(_settings(config_settings)), config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return _requires(_backend.get_requires_for_build_editable(_settings(config_settings)), config_settings)


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    return _backend.get_requires_for_build_sdist(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return _backend.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return _backend.prepare_metadata_for_build_editable(metadata_directory, _settings(config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return _backend.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return _backend.build_editable(wheel_directory, _settings(config_settings), metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    return _backend.build_sdist(sdist_directory, config_settings)
