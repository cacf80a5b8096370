"""The layers for Flax Linen. Parameters have the NNX layers' names and shapes, and the functional core is shared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from flax_layers import _functional as F

Array = Any
Dtype = Any
Initializer = Callable[..., Any]


class _Projected(nn.Module):
    """What both attention layers share. Attributes are those of the NNX layers, which document them."""

    def _dense(self, features: int, use_bias: bool, name: str) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    def _heads(self, x: Array, num_kv_heads: int | None) -> tuple[Array, Array, Array]:
        num_kv_heads, head_dim = F.check_heads(x.shape[-1], self.num_heads, num_kv_heads, self.head_dim)
        use_bias = self.use_bias if self.qkv_bias is None else self.qkv_bias
        qkv = self._dense((self.num_heads + 2 * num_kv_heads) * head_dim, use_bias, "qkv")(x)
        return F.split_heads(qkv, self.num_heads, num_kv_heads, head_dim)

    def _weight_dropout(self, deterministic: bool) -> Callable[[Array], Array] | None:
        if deterministic or self.dropout_rate == 0.0:
            return None
        return nn.Dropout(self.dropout_rate, deterministic=False, name="dropout")

    def _output(self, attended: Array, lengths: Sequence[int], features: int, deterministic: bool) -> Array:
        merged = F.merge_heads(F.crop_tokens(attended, lengths))
        out = self._dense(features if self.out_features is None else self.out_features, self.use_bias, "proj")(merged)
        return nn.Dropout(self.projection_dropout_rate, deterministic=deterministic, name="projection_dropout")(out)

    def _deterministic(self, deterministic: bool | None) -> bool:
        if self.dropout_rate == 0.0 and self.projection_dropout_rate == 0.0:
            return True
        return nn.merge_param("deterministic", self.deterministic, deterministic)


class NeighborhoodAttention(_Projected):
    """Multi-head neighborhood self-attention; see :class:`flax_layers.NeighborhoodAttention` for the attributes.

    As in ``linen.MultiHeadDotProductAttention``, ``deterministic`` is an attribute or an argument of the call, needed where
    a dropout rate is not zero, and the random collection is ``"dropout"``.
    """

    num_heads: int
    window_size: int | Sequence[int]
    rank: int | None = None
    stride: int | Sequence[int] = 1
    dilation: int | Sequence[int] = 1
    is_causal: bool | Sequence[bool] = False
    scale: float | None = None
    relative_bias: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    qkv_bias: bool | None = None
    dropout_rate: float = 0.0
    projection_dropout_rate: float = 0.0
    deterministic: bool | None = None
    fit: F.Fit = "error"
    implementation: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    rpb_init: Initializer = nn.initializers.truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """Attend over ``x [B, *spatial, features]``."""
        F.check_fit(self.fit)
        full = F.make_geometry(self.window_size, self.stride, self.dilation, self.is_causal, self.rank)
        F.check_tokens(x, x.shape[-1], full.rank)
        deterministic = self._deterministic(deterministic)
        lengths = x.shape[1:-1]
        geometry, padding = F.fit_geometry(full, lengths, self.fit)
        query, key, value = self._heads(F.pad_tokens(x, padding), self.num_kv_heads)
        bias = None
        if self.relative_bias:
            F.check_bias(full)
            bias = self.param("rpb", self.rpb_init, (self.num_heads, *full.bias_shape), self.param_dtype)
        attended = F.attend(
            query,
            key,
            value,
            geometry,
            scale=self.scale,
            bias=bias,
            precision=self.precision,
            implementation=self.implementation,
            dropout=self._weight_dropout(deterministic),
        )
        return self._output(attended, lengths, x.shape[-1], deterministic)


class HydraNeighborhoodAttention(_Projected):
    """Heads in groups with their own windows; see :class:`flax_layers.HydraNeighborhoodAttention` for the attributes."""

    num_heads: int
    window_sizes: Sequence[Any]
    dilations: Sequence[Any] = (1,)
    rank: int | None = None
    strides: Sequence[Any] = (1,)
    is_causals: Sequence[Any] = (False,)
    scale: float | None = None
    relative_bias: bool = True
    head_dim: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    qkv_bias: bool | None = None
    dropout_rate: float = 0.0
    projection_dropout_rate: float = 0.0
    deterministic: bool | None = None
    fit: F.Fit = "error"
    implementation: str | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    rpb_init: Initializer = nn.initializers.truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """Attend over ``x [B, *spatial, features]``."""
        F.check_fit(self.fit)
        geometries = F.make_geometries(self.window_sizes, self.strides, self.dilations, self.is_causals, self.rank)
        sizes = F.divide_heads(self.num_heads, len(geometries))
        F.check_tokens(x, x.shape[-1], geometries[0].rank)
        deterministic = self._deterministic(deterministic)
        lengths = x.shape[1:-1]
        query, key, value = self._heads(F.pad_tokens(x, F.joint_padding(geometries, lengths, self.fit)), None)
        biases = None
        if self.relative_bias:
            biases = []
            for group, (heads, geometry) in enumerate(zip(sizes, geometries, strict=True)):
                F.check_bias(geometry)
                biases.append(self.param(f"rpb_{group}", self.rpb_init, (heads, *geometry.bias_shape), self.param_dtype))
        attended = F.hydra_attend(
            query,
            key,
            value,
            geometries,
            sizes,
            biases=biases,
            fit=self.fit,
            scale=self.scale,
            precision=self.precision,
            implementation=self.implementation,
            dropout=self._weight_dropout(deterministic),
        )
        return self._output(attended, lengths, x.shape[-1], deterministic)


class NeighborhoodTransformerBlock(nn.Module):
    """A pre-norm transformer block; see :class:`flax_layers.NeighborhoodTransformerBlock`.

    ``attention`` holds options of :class:`NeighborhoodAttention` (``stride``, ``dilation``, ``relative_bias``, ...).
    """

    num_heads: int
    window_size: int | Sequence[int]
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.0
    layer_scale: float | None = None
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    deterministic: bool | None = None
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    attention: Any = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """``x [B, *spatial, features]`` to the same shape."""
        if self.dropout_rate or self.attention_dropout_rate or self.drop_path_rate:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        else:
            deterministic = True
        features, rank = x.shape[-1], x.ndim - 2
        shared: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        inits: dict[str, Any] = {"precision": self.precision, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        norm = functools.partial(nn.LayerNorm, epsilon=self.epsilon, **shared)

        def dense(count: int, name: str) -> Any:
            return nn.Dense(count, name=name, **shared, **inits)

        drop = nn.Dropout(self.dropout_rate, deterministic=deterministic)
        drop_path = nn.Dropout(
            self.drop_path_rate, tuple(range(1, rank + 2)), deterministic=deterministic, name="drop_path"
        )

        def branch(y: Array, name: str) -> Array:
            if self.layer_scale is not None:
                init = nn.initializers.constant(self.layer_scale)
                y = y * self.param(name, init, (features,), self.param_dtype).astype(y.dtype)
            return drop_path(y).astype(x.dtype)

        attn = NeighborhoodAttention(
            self.num_heads,
            self.window_size,
            dropout_rate=self.attention_dropout_rate,
            projection_dropout_rate=self.dropout_rate,
            name="attn",
            **(self.attention or {}),
            **shared,
            **inits,
        )
        x = x + branch(attn(norm(name="norm1")(x), deterministic), "gamma1")
        y = F.gelu(dense(int(features * self.mlp_ratio), "fc1")(norm(name="norm2")(x)))
        return x + branch(drop(dense(features, "fc2")(drop(y))), "gamma2")
