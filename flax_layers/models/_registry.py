"""The published models by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from flax_layers.models._stylenat import StyleNAT
from flax_layers.models._vision import NAT, DiNATs, Isotropic

Config = dict[str, Any]

_DEPTHS = (3, 4, 18, 5)
_MINI: Config = {
    "embed_dim": 64,
    "depths": (3, 4, 6, 5),
    "num_heads": (2, 4, 8, 16),
    "mlp_ratio": 3.0,
    "drop_path_rate": 0.2,
}
_TINY: Config = _MINI | {"depths": _DEPTHS}
_SMALL: Config = {"embed_dim": 96, "depths": _DEPTHS, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE: Config = {"embed_dim": 128, "depths": _DEPTHS, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0, "drop_path_rate": 0.5}
_LARGE: Config = {
    "embed_dim": 192,
    "depths": _DEPTHS,
    "num_heads": (6, 12, 24, 48),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.35,
}


def alternating(depths: tuple[int, ...], largest: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Dilations of every level: 1 and the level's largest, in turn."""
    return tuple(tuple((1, far)[i % 2] for i in range(depth)) for depth, far in zip(depths, largest, strict=True))


def _dinat(config: Config, largest: tuple[int, ...] = (8, 4, 2, 1), **changes: Any) -> tuple[type, Config]:
    return NAT, config | {"dilations": alternating(config["depths"], largest)} | changes


def _dinat_s(
    embed_dim: int, depth: int, first_heads: int, drop_path_rate: float, largest: tuple[int, ...] = (8, 4, 2, 1)
) -> tuple[type, Config]:
    depths = (2, 2, depth, 2)
    config: Config = {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": tuple(first_heads * 2**i for i in range(4)),
        "drop_path_rate": drop_path_rate,
        "dilations": alternating(depths, largest),
    }
    return DiNATs, config


_ISOTROPIC_SMALL: Config = {"embed_dim": 384, "depth": 12, "num_heads": 12, "drop_path_rate": 0.1}
_ISOTROPIC_BASE: Config = {"embed_dim": 768, "depth": 12, "num_heads": 24, "drop_path_rate": 0.4}

_MODELS: dict[str, tuple[Callable[..., nnx.Module], Config]] = {
    "nat_mini": (NAT, _MINI),
    "nat_tiny": (NAT, _TINY),
    "nat_small": (NAT, _SMALL | {"layer_scale": 1e-5}),
    "nat_base": (NAT, _BASE | {"layer_scale": 1e-5}),
    "dinat_mini": _dinat(_MINI),
    "dinat_tiny": _dinat(_TINY),
    "dinat_small": _dinat(_SMALL),
    "dinat_base": _dinat(_BASE, layer_scale=1e-5),
    "dinat_large": _dinat(_LARGE),
    "dinat_large_384": _dinat(_LARGE, (13, 6, 3, 1)),
    "dinat_large_384_11x11": _dinat(_LARGE, window_size=11),
    "dinat_s_tiny": _dinat_s(96, 6, 3, 0.2),
    "dinat_s_small": _dinat_s(96, 18, 3, 0.3),
    "dinat_s_base": _dinat_s(128, 18, 4, 0.5),
    "dinat_s_large": _dinat_s(192, 18, 6, 0.35),
    "dinat_s_large_384": _dinat_s(192, 18, 6, 0.35, (13, 6, 3, 1)),
    "nat_isotropic_small": (Isotropic, _ISOTROPIC_SMALL),
    "nat_isotropic_base": (Isotropic, _ISOTROPIC_BASE),
    "dinat_isotropic_small": (Isotropic, _ISOTROPIC_SMALL | {"dilations": (1, 2)}),
    "dinat_isotropic_base": (Isotropic, _ISOTROPIC_BASE | {"dilations": (1, 2)}),
    "stylenat_ffhq_256": (StyleNAT, {"image_size": 256}),
    "stylenat_ffhq_1024": (StyleNAT, {"image_size": 1024}),
}


def names() -> tuple[str, ...]:
    """Names of all registered models."""
    return tuple(_MODELS)


def register(name: str, model: Callable[..., nnx.Module], **config: Any) -> None:
    """Add a model of your own: ``create(name, **overrides)`` calls ``model(**config | overrides)``."""
    if name in _MODELS:
        raise ValueError(f"model {name!r} is registered already")
    _MODELS[name] = (model, dict(config))


def config(name: str) -> Config:
    """The published configuration, as keyword arguments of the model's class."""
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is unknown: expected one of {', '.join(_MODELS)}")
    return dict(_MODELS[name][1])


def create(name: str, *, rngs: nnx.Rngs, **overrides: Any) -> Any:
    """A registered model with random weights; ``overrides`` replace entries of its :func:`config`."""
    arguments = config(name) | overrides
    return _MODELS[name][0](**arguments, rngs=rngs)
