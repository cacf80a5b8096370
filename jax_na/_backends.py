"""Who can serve a call, and why not: the registry of implementations and the choice among them.

An implementation is named by the user (``implementation="xla"``) or chosen at lowering time for the platform that is lowered
for, never by the machine that traces. A named one that cannot serve raises ``NotImplementedError`` with its reason.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

from jax_na import _cuda, _definition, _unfused, _xla
from jax_na._spec import Inputs, Spec


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute the operation.

    Attributes:
      name: what users pass as ``implementation``.
      platforms: the platforms it lowers for; ``None`` means every one.
      why_not: from the spec and the operands' shapes and dtypes, the reason it cannot serve, or ``None``.
      forward: ``(spec, inputs, halo) -> (out, lse)``.
      backward: ``(spec, inputs, out, lse, grad_out, grad_lse | None, halo) -> Inputs`` of gradients.
    """

    name: str
    platforms: tuple[str, ...] | None
    why_not: Callable[[Spec, Inputs], str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def why_not_on(self, platform: str | None, spec: Spec, inputs: Inputs) -> str | None:
        """Why it cannot serve on ``platform``; with ``None``, why it cannot serve anywhere."""
        if platform is not None and self.platforms is not None and platform not in self.platforms:
            return f"it runs on {', '.join(self.platforms)}, and the call is lowered for {platform}"
        return self.why_not(spec, inputs)


def _serves(spec: Spec, inputs: Inputs) -> str | None:
    return None


# In order of preference: with implementation=None the first that serves is taken. Those after "xla" only run when named.
IMPLEMENTATIONS: dict[str, Implementation] = {}


def register(implementation: Implementation) -> None:
    IMPLEMENTATIONS[implementation.name] = implementation


def _register_cuda(name: str, family: str | None) -> None:
    """``family=None``: the best kernel family for the device of the call."""
    bound: list[Any] = [functools.partial(f, family) for f in (_cuda.why_not, _cuda.forward, _cuda.backward)]
    register(Implementation(name, ("cuda",), *bound))


def _register_unfused(name: str, products: str) -> None:
    """Attention composed of the unfused products of that name: the weights lie in memory."""
    bound: list[Any] = [functools.partial(f, products) for f in (_unfused.why_not, _unfused.forward, _unfused.backward)]
    register(Implementation(name, _unfused.PRODUCTS[products].platforms, *bound))


_register_cuda("cuda", None)
register(Implementation("xla", None, _serves, _xla.forward, _xla.backward))
for _family in _cuda.FAMILIES:
    _register_cuda(f"cuda_{_family.name}", _family.name)
for _name, _products in _unfused.STORES_WEIGHTS.items():
    _register_unfused(_name, _products)
register(Implementation("reference", None, _serves, _definition.forward, _definition.backward))


def check_name(name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name in IMPLEMENTATIONS):
        raise ValueError(f"implementation={name!r} is unknown: expected None or one of {', '.join(IMPLEMENTATIONS)}")


@functools.cache
def _warn_that_xla_serves(missing: str) -> None:
    warnings.warn(
        f"neighborhood attention runs on the GPU through XLA, not through CUDA kernels, which are not available: {missing}. "
        'Pass implementation="xla" to choose this without a warning.',
        stacklevel=2,
    )


def choose(platform: str | None, spec: Spec, inputs: Inputs) -> Implementation:
    """The implementation that serves this call on ``platform`` (``None``: checked without a platform, at trace time)."""
    check_name(spec.implementation)
    if spec.implementation is not None:
        named = IMPLEMENTATIONS[spec.implementation]
        reason = named.why_not_on(platform, spec, inputs)
        if reason is None and platform == "cuda" and named.platforms is not None:
            reason = _cuda.missing_here()  # without a GPU here this is lowered for another machine, which may have the lane
        if reason is not None:
            raise NotImplementedError(f"implementation={named.name!r} cannot serve this call: {reason}")
        return named
    for candidate in IMPLEMENTATIONS.values():
        if candidate.why_not_on(platform, spec, inputs) is not None:
            continue
        if platform == "cuda" and candidate.platforms is not None and (missing := _cuda.lane().missing) is not None:
            _warn_that_xla_serves(missing)
            continue
        return candidate
    raise AssertionError("the XLA implementation serves every call")
