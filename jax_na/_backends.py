"""Who can serve a call, and why not: the registry of implementations and the choice among them.

An implementation is named by the user (``implementation="xla"``) or chosen at lowering time for the platform that is lowered
for, never by the machine that traces. A named one that cannot serve raises ``NotImplementedError`` with its reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jax_na import _definition, _xla
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


# In order of preference: with implementation=None the first that serves is taken. "reference" is never chosen by itself.
IMPLEMENTATIONS: dict[str, Implementation] = {}


def register(implementation: Implementation) -> None:
    IMPLEMENTATIONS[implementation.name] = implementation


register(Implementation("xla", None, _serves, _xla.forward, _xla.backward))
register(Implementation("reference", None, _serves, _definition.forward, _definition.backward))


def check_name(name: str | None) -> None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: expected None or one of {', '.join(IMPLEMENTATIONS)}")


def choose(platform: str | None, spec: Spec, inputs: Inputs) -> Implementation:
    """The implementation that serves this call on ``platform`` (``None``: checked without a platform, at trace time)."""
    check_name(spec.implementation)
    if spec.implementation is not None:
        named = IMPLEMENTATIONS[spec.implementation]
        reason = named.why_not_on(platform, spec, inputs)
        if reason is not None:
            raise NotImplementedError(f"implementation={named.name!r} cannot serve this call: {reason}")
        return named
    for candidate in IMPLEMENTATIONS.values():
        if candidate.why_not_on(platform, spec, inputs) is None:
            return candidate
    raise AssertionError("the XLA implementation serves every call")
