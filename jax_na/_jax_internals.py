"""The only file that reaches into jax's private modules: one place to mend when they move."""

from jax._src.dispatch import apply_primitive

__all__ = ["apply_primitive"]
