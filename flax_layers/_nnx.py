"""The layers for Flax NNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flax_layers import _functional as F

Array = Any
Dtype = Any
Initializer = Callable[..., Any]

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
default_rpb_init = nnx.initializers.truncated_normal(0.02)


def _dropout(rate: float, rngs: nnx.Rngs, broadcast_dims: Sequence[int] = ()) -> Any:
    """A dropout submodule, or nothing (and no random state) where the rate is zero."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate {rate}: it must be at least 0 and below 1")
    return nnx.Dropout(rate, broadcast_dims=tuple(broadcast_dims), rngs=rngs) if rate > 0.0 else nnx.data(None)


def _apply_dropout(module: Any, x: Array, deterministic: bool | None, rngs: nnx.Rngs | None) -> Array:
    return x if module is None else module(x, deterministic=deterministic, rngs=rngs)


class _Projected(nnx.Module):
    """The two projections and the two dropouts around an attention: what both attention layers share."""

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        head_dim: int | None,
        out_features: int | None,
        use_bias: bool,
        qkv_bias: bool | None,
        dropout_rate: float,
        projection_dropout_rate: float,
        scale: float | None,
        fit: F.Fit,
        implementation: str | None,
        dtype: Dtype | None,
        param_dtype: Dtype,
        precision: Any,
        kernel_init: Initializer,
        bias_init: Initializer,
        rngs: nnx.Rngs,
    ):
        F.check_fit(fit)
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = F.check_heads(in_features, num_heads, num_kv_heads, head_dim)
        self.scale = scale
        self.fit = fit
        self.implementation = implementation
        self.precision = precision
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        qkv_features = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv = linear(in_features, qkv_features, use_bias=use_bias if qkv_bias is None else qkv_bias)
        self.proj = linear(self.num_heads * self.head_dim, self.out_features, use_bias=use_bias)
        self.dropout = _dropout(dropout_rate, rngs)
        self.projection_dropout = _dropout(projection_dropout_rate, rngs)

    def _weight_dropout(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> Callable[[Array], Array] | None:
        """Dropout of the attention weights if it acts in this call."""
        if self.dropout is None or (self.dropout.deterministic if deterministic is None else deterministic):
            return None
        return functools.partial(self.dropout, deterministic=False, rngs=rngs)

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        return F.split_heads(self.qkv(x), self.num_heads, self.num_kv_heads, self.head_dim)

    def _output(self, attended: Array, lengths: Sequence[int], deterministic: bool | None, rngs: nnx.Rngs | None) -> Array:
        out = self.proj(F.merge_heads(F.crop_tokens(attended, lengths)))
        return _apply_dropout(self.projection_dropout, out, deterministic, rngs)


class NeighborhoodAttention(_Projected):
    """Multi-head neighborhood self-attention over 1, 2 or 3 spatial axes.

    ``x [B, *spatial, in_features]`` is projected to queries, keys and values by one ``Linear``, each token attends to its
    neighbours (:func:`jax_na.neighborhood_attention`), and the heads are projected to ``[B, *spatial, out_features]``.

    Args:
      in_features: features of the input.
      num_heads: query heads; ``head_dim`` (default ``in_features // num_heads``) features each.
      window_size: neighbours per spatial axis; its entries give the rank. A scalar needs ``rank``.
      rank: number of spatial axes, where ``window_size`` is a scalar.
      stride, dilation, is_causal: as in :func:`jax_na.neighborhood_attention`, one entry per axis or a scalar.
      scale: multiplies ``query . key``; default ``head_dim ** -0.5``.
      relative_bias: learn a bias per head and relative position, ``rpb [H, 2 * window - 1, ...]`` (odd windows).
      num_kv_heads: key/value heads shared by groups of query heads; default ``num_heads``.
      head_dim, out_features: defaults follow ``in_features``.
      use_bias: biases in both projections; ``qkv_bias``, where given, decides for the first one.
      dropout_rate: dropout of the attention weights. While it acts the weights are materialized (``na_qk``, ``na_av``).
      projection_dropout_rate: dropout after the output projection.
      fit: what happens to inputs smaller than ``window_size * dilation``: ``"error"``; ``"shrink"`` the dilation, then the
        window, with a :class:`WindowFitWarning`; or ``"pad"`` with zero tokens, as the published PyTorch models do.
      implementation: ``None`` or a name, as in :func:`jax_na.neighborhood_attention`. While ``dropout_rate`` acts, one that has
        no ``na_qk`` and ``na_av`` leaves the choice among those that do.
      dtype: of the computation (default: promoted from input and parameters); ``param_dtype``: of the parameters.
      precision: of the projections and the attention.
      kernel_init, bias_init, rpb_init: initializers.
      rngs: random keys (``params``; ``dropout`` where a dropout rate is not zero).

    Raises:
      ValueError, TypeError: an illegal argument or input; the message names it, its value and the limit.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        window_size: int | Sequence[int],
        *,
        rank: int | None = None,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        scale: float | None = None,
        relative_bias: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        qkv_bias: bool | None = None,
        dropout_rate: float = 0.0,
        projection_dropout_rate: float = 0.0,
        fit: F.Fit = "error",
        implementation: str | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rpb_init: Initializer = default_rpb_init,
        rngs: nnx.Rngs,
    ):
        self.geometry = F.make_geometry(window_size, stride, dilation, is_causal, rank)
        super().__init__(
            in_features,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            out_features=out_features,
            use_bias=use_bias,
            qkv_bias=qkv_bias,
            dropout_rate=dropout_rate,
            projection_dropout_rate=projection_dropout_rate,
            scale=scale,
            fit=fit,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.rpb: Any = nnx.data(None)
        if relative_bias:
            F.check_bias(self.geometry)
            self.rpb = nnx.Param(rpb_init(rngs.params(), (num_heads, *self.geometry.bias_shape), param_dtype))

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """Attend over ``x [B, *spatial, in_features]``; ``deterministic`` and ``rngs`` are for the dropouts."""
        F.check_tokens(x, self.in_features, self.geometry.rank)
        lengths = x.shape[1:-1]
        geometry, padding = F.fit_geometry(self.geometry, lengths, self.fit)
        query, key, value = self._heads(F.pad_tokens(x, padding))
        attended = F.attend(
            query,
            key,
            value,
            geometry,
            scale=self.scale,
            bias=None if self.rpb is None else self.rpb[...],
            precision=self.precision,
            implementation=self.implementation,
            dropout=self._weight_dropout(deterministic, rngs),
        )
        return self._output(attended, lengths, deterministic, rngs)


class HydraNeighborhoodAttention(_Projected):
    """Neighborhood attention whose heads are divided into groups, each with its own window, dilation and bias.

    ``window_sizes``, ``dilations``, ``strides`` and ``is_causals`` hold one entry per group, or a single entry for all.
    Heads are divided evenly, a remainder goes to the last groups, one each. Groups of equal geometry are served by one call.

    Args:
      in_features, num_heads: as in :class:`NeighborhoodAttention`.
      window_sizes: one window per group; an entry is a scalar (then ``rank`` is needed) or one number per axis.
      dilations, strides, is_causals: likewise.
      relative_bias: one ``rpb`` per group, ``[heads of the group, 2 * window - 1, ...]``; on by default.
      others: as in :class:`NeighborhoodAttention`.

    Source: Walton et al., "StyleNAT: Giving Each Head a New Perspective" (arXiv 2211.05770).
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        window_sizes: Sequence[int | Sequence[int]],
        dilations: Sequence[int | Sequence[int]] = (1,),
        *,
        rank: int | None = None,
        strides: Sequence[int | Sequence[int]] = (1,),
        is_causals: Sequence[bool | Sequence[bool]] = (False,),
        scale: float | None = None,
        relative_bias: bool = True,
        head_dim: int | None = None,
        out_features: int | None = None,
        use_bias: bool = True,
        qkv_bias: bool | None = None,
        dropout_rate: float = 0.0,
        projection_dropout_rate: float = 0.0,
        fit: F.Fit = "error",
        implementation: str | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rpb_init: Initializer = default_rpb_init,
        rngs: nnx.Rngs,
    ):
        self.geometries = F.make_geometries(window_sizes, strides, dilations, is_causals, rank)
        super().__init__(
            in_features,
            num_heads,
            num_kv_heads=None,
            head_dim=head_dim,
            out_features=out_features,
            use_bias=use_bias,
            qkv_bias=qkv_bias,
            dropout_rate=dropout_rate,
            projection_dropout_rate=projection_dropout_rate,
            scale=scale,
            fit=fit,
            implementation=implementation,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.heads_per_group = F.divide_heads(num_heads, len(self.geometries))
        self.rpb: Any = nnx.data(None)
        if relative_bias:
            for geometry in self.geometries:
                F.check_bias(geometry)
            self.rpb = nnx.List(
                nnx.Param(rpb_init(rngs.params(), (heads, *geometry.bias_shape), param_dtype))
                for heads, geometry in zip(self.heads_per_group, self.geometries, strict=True)
            )

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """Attend over ``x [B, *spatial, in_features]``; ``deterministic`` and ``rngs`` are for the dropouts."""
        F.check_tokens(x, self.in_features, self.geometries[0].rank)
        lengths = x.shape[1:-1]
        query, key, value = self._heads(F.pad_tokens(x, F.joint_padding(self.geometries, lengths, self.fit)))
        attended = F.hydra_attend(
            query,
            key,
            value,
            self.geometries,
            self.heads_per_group,
            biases=None if self.rpb is None else [rpb[...] for rpb in self.rpb],
            fit=self.fit,
            scale=self.scale,
            precision=self.precision,
            implementation=self.implementation,
            dropout=self._weight_dropout(deterministic, rngs),
        )
        return self._output(attended, lengths, deterministic, rngs)


class StochasticDepth(nnx.Module):
    """Drops a residual branch ``[B, ...]`` for whole batch elements, and scales the kept ones to keep the mean."""

    def __init__(self, rate: float, *, rank: int, rngs: nnx.Rngs):
        self.dropout = _dropout(rate, rngs, broadcast_dims=range(1, rank + 2))

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        return _apply_dropout(self.dropout, x, deterministic, rngs)


class MLP(nnx.Module):
    """``Linear, exact GELU, dropout, Linear, dropout``."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dropout_rate: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
    ):
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.fc1 = linear(in_features, hidden_features)
        self.fc2 = linear(hidden_features, in_features)
        self.dropout = _dropout(dropout_rate, rngs)

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        x = _apply_dropout(self.dropout, F.gelu(self.fc1(x)), deterministic, rngs)
        return _apply_dropout(self.dropout, self.fc2(x), deterministic, rngs)


class NeighborhoodTransformerBlock(nnx.Module):
    """A pre-norm transformer block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
      in_features, num_heads, window_size: as in :class:`NeighborhoodAttention`, which takes ``attention_options``
        (``stride``, ``dilation``, ``relative_bias``, ``fit``, ...).
      mlp_ratio: hidden features of the MLP per feature.
      drop_path_rate: stochastic depth of each of the two branches.
      layer_scale: initial value of a learned scale per feature and branch (``gamma1``, ``gamma2``); ``None``: no scale.
      dropout_rate: dropout in the MLP and after the attention's output projection; ``attention_dropout_rate``: of the
        attention weights.
      epsilon: of the layer norms.
      others: as in :class:`NeighborhoodAttention`.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        window_size: int | Sequence[int],
        *,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        rngs: nnx.Rngs,
        **attention_options: Any,
    ):
        norm = functools.partial(nnx.LayerNorm, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        shared: dict[str, Any] = {
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.norm1 = norm(in_features)
        self.attn = NeighborhoodAttention(
            in_features,
            num_heads,
            window_size,
            dropout_rate=attention_dropout_rate,
            projection_dropout_rate=dropout_rate,
            **attention_options,
            **shared,
        )
        self.norm2 = norm(in_features)
        self.mlp = MLP(in_features, int(in_features * mlp_ratio), dropout_rate=dropout_rate, **shared)
        self.drop_path = StochasticDepth(drop_path_rate, rank=self.attn.geometry.rank, rngs=rngs)
        if layer_scale is None:
            self.gamma1, self.gamma2 = nnx.data(None), nnx.data(None)
        else:
            self.gamma1 = nnx.Param(jnp.full((in_features,), layer_scale, param_dtype))
            self.gamma2 = nnx.Param(jnp.full((in_features,), layer_scale, param_dtype))

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """``x [B, *spatial, in_features]`` to the same shape."""
        flags: dict[str, Any] = {"deterministic": deterministic, "rngs": rngs}

        def branch(y: Array, gamma: nnx.Param | None) -> Array:
            y = y if gamma is None else y * gamma[...].astype(y.dtype)
            return self.drop_path(y, **flags).astype(x.dtype)

        x = x + branch(self.attn(self.norm1(x), **flags), self.gamma1)
        return x + branch(self.mlp(self.norm2(x), **flags), self.gamma2)
