"""Which implementation would run, and why the others would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_na import _backends, _cuda
from jax_na._spec import Inputs, check_inputs, make_spec

Array = Any


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes:
      platform: the platform asked about ("cpu", "cuda", ...).
      capability: the GPU's compute capability times ten, or ``None`` (no GPU, or not known).
      chosen: the implementation that would run.
      forward_kernels, backward_kernels: for a CUDA implementation the kernel families, first choice first.
      why_not: for every implementation the reason it would not run if it were named, ``None`` if it would.
    """

    platform: str
    capability: int | None
    chosen: str
    forward_kernels: tuple[str, ...]
    backward_kernels: tuple[str, ...]
    why_not: dict[str, str | None]

    def __str__(self) -> str:
        device = (
            self.platform if self.capability is None else f"{self.platform}, compute capability {self.capability / 10:.1f}"
        )
        lines = [f"{self.chosen} would run on {device}"]
        if self.forward_kernels:
            lines.append(
                f"  forward by the {self.forward_kernels[0]} kernels, "
                + (
                    f"backward by the {self.backward_kernels[0]} kernels"
                    if self.backward_kernels
                    else "no backward kernels"
                )
            )
        width = max(map(len, self.why_not))
        for name, reason in self.why_not.items():
            lines.append(f"  {name:{width}s}  {'can serve' if reason is None else 'cannot serve: ' + reason}")
        return "\n".join(lines)


def _platform_here() -> str:
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" and jax.devices("cuda") else backend


def _capability_here(platform: str) -> int | None:
    if platform != "cuda":
        return None
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    return int(str(device.compute_capability).replace(".", ""))


def explain(
    query: Array,
    key: Array,
    value: Array,
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Array | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    precision: Any = None,
    implementation: str | None = None,
    deterministic: bool | None = None,
    shrink_window: bool = False,
    platform: str | None = None,
    capability: int | None = None,
) -> Explanation:
    """Which implementation :func:`neighborhood_attention` would run with these arguments, and why the others would not.

    Args:
      query, key, value, ...: as for :func:`neighborhood_attention`; only shapes and dtypes matter, so
        ``jax.ShapeDtypeStruct`` will do. Nothing is computed or traced.
      platform: the platform lowered for, "cpu", "cuda", ...; default: that of jax's default device.
      capability: compute capability of the GPU times ten, such as 80 or 90; default: that of the first GPU here, if any.

    Returns:
      An :class:`Explanation`; ``print`` it.

    Raises:
      ValueError, TypeError: as :func:`neighborhood_attention` does.

    On ``cuda`` with ``implementation=None`` the CUDA kernels run if the lane is available (``jax_na.cuda_status()``) and the
    dtype is float16, bfloat16 or float32; otherwise the XLA implementation does. float64 always goes to XLA.
    """
    _backends.check_name(implementation)
    given = Inputs(query, key, value, bias, additional_keys, additional_values)
    inputs = Inputs(*(None if x is None else jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in given))
    spec = make_spec(
        inputs.query,
        window_size,
        stride,
        dilation,
        is_causal,
        scale,
        precision,
        implementation,
        deterministic,
        shrink_window,
    )
    check_inputs(inputs, spec)
    platform = _platform_here() if platform is None else {"gpu": "cuda"}.get(platform, platform)
    capability = _capability_here(platform) if capability is None else capability
    why_not: dict[str, str | None] = {}
    kernels: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for name, candidate in _backends.IMPLEMENTATIONS.items():
        reason = candidate.why_not_on(platform, spec, inputs)
        if reason is None and candidate.platforms is not None:
            only = name.removeprefix("cuda").removeprefix("_") or None
            reason = _cuda.lane().missing
            if only is not None and all(family.name != only for family in _cuda.FAMILIES):  # built on the unfused products
                reason = reason or _cuda.why_not_capability(capability, 80)
                kernels[name] = ((only,), (only,))
            else:
                families = [_cuda.candidates(spec, inputs, backward, only) for backward in (False, True)]
                fitting = [[f.name for f in side if f.why_not_on(capability) is None] for side in families]
                if reason is None and not fitting[0]:
                    reason = "; ".join(f"{f.name}: {f.why_not_on(capability)}" for f in families[0])
                kernels[name] = (tuple(fitting[0]), tuple(fitting[1]))
        why_not[name] = reason
    order = _backends.IMPLEMENTATIONS if implementation is None else [implementation]
    chosen = next((name for name in order if why_not[name] is None), "nothing")
    return Explanation(platform, capability, chosen, *kernels.get(chosen, ((), ())), why_not)
