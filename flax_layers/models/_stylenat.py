"""The StyleNAT generator: style-based image synthesis with Hydra neighborhood attention.

``z -> mapping network -> w``; from a learned 4x4 constant, each resolution has two blocks modulated by ``w`` (adaptive
instance norm), then a bilinear upsampling; the image is the sum of one RGB projection per resolution. Attributes carry the
names of the published PyTorch checkpoints.

Sources: Walton et al., "StyleNAT: Giving Each Head a New Perspective" (arXiv 2211.05770); the skeleton is that of Zhang
et al., "StyleSwin" (arXiv 2112.10762), the mapping network and the RGB skips those of Karras et al., "StyleGAN2"
(arXiv 1912.04958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_layers import _functional as F
from flax_layers._nnx import MLP, HydraNeighborhoodAttention, _Projected, default_bias_init, default_rpb_init
from flax_layers.models._vision import EPSILON, kernel_init

Array = Any
Dtype = Any

FIRST_SIZE = 4
# Per resolution, from 4x4 up to 1024x1024.
CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)
# Per resolution, from 8x8 up: at 4x4 every token sees all 16, as in the published checkpoints.
WINDOWS = ((7,),) * 8
DILATIONS = ((1,), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128))


class PixelNorm(nnx.Module):
    """Divides ``x [B, C]`` by the root mean square of its features."""

    def __call__(self, x: Array) -> Array:
        return x * lax.rsqrt(jnp.mean(x**2, axis=1, keepdims=True) + 1e-8)


class EqualLinear(nnx.Module):
    """A linear layer with equalized learning rate: stored weights are ``N(0, 1) / lr_mul``, scaled at run time."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lr_mul: float = 1.0,
        activate: bool = False,
        dtype: Dtype | None,
        param_dtype: Dtype,
        precision: Any,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (in_features, out_features), param_dtype) / lr_mul)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.scale, self.lr_mul, self.activate = lr_mul / math.sqrt(in_features), lr_mul, activate
        self.dtype, self.precision = dtype, precision

    def __call__(self, x: Array) -> Array:
        x, kernel, bias = nnx.nn.dtypes.promote_dtype((x, self.kernel[...], self.bias[...]), dtype=self.dtype)
        x = jnp.dot(x, kernel * self.scale, precision=self.precision) + bias * self.lr_mul
        return jax.nn.leaky_relu(x, 0.2) * math.sqrt(2.0) if self.activate else x


class AdaptiveInstanceNorm(nnx.Module):
    """Normalizes each channel over the tokens of an image, then scales and shifts it by the style."""

    def __init__(self, features: int, style_dim: int, **options: Any):
        self.style = EqualLinear(style_dim, 2 * features, **options)

    def __call__(self, x: Array, style: Array) -> Array:
        gamma, beta = jnp.split(self.style(style)[:, None, None, :], 2, axis=-1)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(wide, axis=(1, 2), keepdims=True)
        variance = jnp.var(wide, axis=(1, 2), keepdims=True)
        return gamma * ((wide - mean) * lax.rsqrt(variance + EPSILON)).astype(gamma.dtype) + beta


class FullAttention(_Projected):
    """Self-attention among all tokens of a ``length x length`` grid, with ``rpb [H, 2 length - 1, 2 length - 1]``."""

    def __init__(self, features: int, num_heads: int, length: int, param_dtype: Dtype, rngs: nnx.Rngs, **options: Any):
        super().__init__(
            features,
            num_heads,
            num_kv_heads=None,
            head_dim=None,
            out_features=None,
            use_bias=True,
            qkv_bias=None,
            dropout_rate=0.0,
            projection_dropout_rate=0.0,
            scale=None,
            fit="error",
            implementation=None,
            kernel_init=kernel_init,
            bias_init=default_bias_init,
            param_dtype=param_dtype,
            rngs=rngs,
            **options,
        )
        self.length = length
        self.rpb = nnx.Param(default_rpb_init(rngs.params(), (num_heads, 2 * length - 1, 2 * length - 1), param_dtype))

    def __call__(self, x: Array) -> Array:
        """``x [B, length, length, features]`` to the same shape."""
        query, key, value = (y.reshape(y.shape[0], self.length**2, *y.shape[-2:]) for y in self._heads(x))
        rows, columns = np.divmod(np.arange(self.length**2), self.length)
        row, column = (entry[None, :] - entry[:, None] + self.length - 1 for entry in (rows, columns))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query * self.head_dim**-0.5, key, precision=self.precision)
        weights = jax.nn.softmax(scores.astype(jnp.float32) + self.rpb[...][:, row, column], axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value, precision=self.precision)
        return self.proj(F.merge_heads(out.reshape(*x.shape[:-1], *out.shape[-2:])))


class StyleBlock(nnx.Module):
    """A pre-norm transformer block whose norms carry the style; ``attn`` maps ``[B, H, W, features]`` to the same shape."""

    def __init__(self, attn: nnx.Module, features: int, style_dim: int, mlp_ratio: float, **options: Any):
        self.norm1 = AdaptiveInstanceNorm(features, style_dim, **options)
        self.attn: Any = attn
        self.norm2 = AdaptiveInstanceNorm(features, style_dim, **options)
        self.mlp = MLP(features, int(features * mlp_ratio), kernel_init=kernel_init, **options)

    def __call__(self, x: Array, style: Array) -> Array:
        x = x + self.attn(self.norm1(x, style)).astype(x.dtype)
        return x + self.mlp(self.norm2(x, style)).astype(x.dtype)


def sinusoidal_grid(height: int, width: int, features: int) -> np.ndarray:
    """Position embedding ``[height, width, features]``: of the column in the first half, of the row in the second."""

    def axis(length: int) -> np.ndarray:
        half = features // 4
        rates = np.exp(np.arange(half) * (-math.log(10000.0) / (half - 1)))
        angles = np.arange(1, length + 1)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns = np.broadcast_to(axis(width)[None], (height, width, features // 2))
    rows = np.broadcast_to(axis(height)[:, None], (height, width, features // 2))
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


class BilinearUpsample(nnx.Module):
    """Twice the resolution, a norm, a projection without bias, and a learned amount of position embedding."""

    def __init__(self, features: int, out_features: int, *, dtype: Any, param_dtype: Any, precision: Any, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(features, epsilon=EPSILON, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.reduction = nnx.Linear(
            features,
            out_features,
            use_bias=False,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        self.alpha = nnx.Param(jnp.zeros((1,), param_dtype))

    def __call__(self, x: Array) -> Array:
        batch, height, width, features = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, features), "bilinear")
        x = self.reduction(self.norm(x))
        grid = jnp.asarray(sinusoidal_grid(2 * height, 2 * width, x.shape[-1]), x.dtype)
        return x + grid * self.alpha[...].astype(x.dtype)


def upsample_image(image: Array) -> Array:
    """``[B, H, W, C] -> [B, 2 H, 2 W, C]`` with the (1, 3, 3, 1) filter of StyleGAN2."""
    taps = np.array([1.0, 3.0, 3.0, 1.0])
    kernel = np.outer(taps, taps) / taps.sum() ** 2 * 4
    channels = image.shape[-1]
    kernel = jnp.asarray(np.broadcast_to(kernel[:, :, None, None], (4, 4, 1, channels)), image.dtype)
    return lax.conv_general_dilated(
        image,
        kernel,
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


class ToRGB(nnx.Module):
    """One resolution's share of the image, added to that of the resolutions below. Always computed in float32."""

    def __init__(self, features: int, upsample: bool, param_dtype: Dtype, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(0.02**2, "fan_avg", "normal")
        self.conv = nnx.Conv(features, 3, (1, 1), kernel_init=init, param_dtype=param_dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((1, 1, 1, 3), param_dtype))
        self.upsample = upsample

    def __call__(self, x: Array, skip: Array | None) -> Array:
        image = self.conv(x.astype(jnp.float32)) + self.bias[...]
        if skip is None:
            return image
        return image + (upsample_image(skip) if self.upsample else skip)


class ConstantInput(nnx.Module):
    """The learned image, ``[1, size, size, features]``, that the first resolution starts from."""

    def __init__(self, features: int, size: int, param_dtype: Dtype, rngs: nnx.Rngs):
        self.input = nnx.Param(jax.random.normal(rngs.params(), (1, size, size, features), param_dtype))


class StyleLevel(nnx.Module):
    """Two blocks at one resolution, and the step to the next one."""

    def __init__(self, blocks: Sequence[StyleBlock], upsample: BilinearUpsample | None):
        self.blocks = nnx.List(blocks)
        self.upsample = nnx.data(None) if upsample is None else upsample


class StyleNAT(nnx.Module):
    """The generator: ``z [B, style_dim]`` to images ``[B, size, size, 3]``, float32, about -1 to 1 after training.

    Args:
      image_size: a power of two from 8 on; 256 and 1024 are the published FFHQ generators.
      style_dim: of ``z`` and ``w``; ``mapping_depth`` layers lead from one to the other.
      channels: per resolution from 4x4 up.
      windows, dilations: per resolution from 8x8 up, with an entry per head group; at 4x4 every token sees all.
      min_heads: heads are ``max(channels // 32, min_heads)``.
      mlp_ratio, mapping_lr_mul: of the blocks; of the mapping network.
      implementation, dtype, param_dtype, precision, rngs: as in the layers.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        style_dim: int = 512,
        mapping_depth: int = 8,
        mapping_lr_mul: float = 0.01,
        channels: Sequence[int] = CHANNELS,
        windows: Sequence[Sequence[int]] = WINDOWS,
        dilations: Sequence[Sequence[int]] = DILATIONS,
        min_heads: int = 4,
        mlp_ratio: float = 4.0,
        implementation: str | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        count = int(math.log2(image_size)) - 1
        if image_size < 2 * FIRST_SIZE or 2 ** (count + 1) != image_size:
            raise ValueError(f"image_size={image_size}: it must be a power of two, at least {2 * FIRST_SIZE}")
        for name, entries, needed in (
            ("channels", channels, count),
            ("windows", windows, count - 1),
            ("dilations", dilations, count - 1),
        ):
            if len(entries) < needed:
                first = 2 ** (count + 2 - needed)
                raise ValueError(
                    f"{name} has {len(entries)} entries, image_size={image_size} needs {needed}: {first}x{first} and up"
                )
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        self.image_size, self.style_dim, self.num_styles = image_size, style_dim, 2 * count
        self.dtype = dtype
        layers = (
            EqualLinear(style_dim, style_dim, lr_mul=mapping_lr_mul, activate=True, **options) for _ in range(mapping_depth)
        )
        self.style = nnx.List([PixelNorm(), *layers])
        self.input = ConstantInput(channels[0], FIRST_SIZE, param_dtype, rngs)

        def attention(i: int) -> nnx.Module:
            heads = max(channels[i] // 32, min_heads)
            if i == 0:
                return FullAttention(channels[0], heads, FIRST_SIZE, **options)
            return HydraNeighborhoodAttention(
                channels[i],
                heads,
                windows[i - 1],
                dilations[i - 1],
                rank=2,
                implementation=implementation,
                kernel_init=kernel_init,
                **options,
            )

        levels, to_rgbs = [], []
        for i in range(count):
            last = i == count - 1
            out_channels = channels[i] if last else channels[i + 1]
            blocks = [StyleBlock(attention(i), channels[i], style_dim, mlp_ratio, **options) for _ in range(2)]
            levels.append(StyleLevel(blocks, None if last else BilinearUpsample(channels[i], out_channels, **options)))
            to_rgbs.append(ToRGB(out_channels, not last, param_dtype, rngs))
        self.layers, self.to_rgbs = nnx.List(levels), nnx.List(to_rgbs)

    def mapping(self, z: Array) -> Array:
        """``z [B, style_dim]`` to one style ``w`` for every block, ``[B, num_styles, style_dim]``."""
        if z.ndim != 2 or z.shape[-1] != self.style_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}: expected [batch, {self.style_dim}]")
        w = z
        for layer in self.style:
            w = layer(w)
        return jnp.broadcast_to(w[:, None], (w.shape[0], self.num_styles, self.style_dim))

    def synthesis(self, w: Array) -> Array:
        """Styles ``[B, num_styles, style_dim]`` to images; rows of several ``w`` may be mixed."""
        if w.ndim != 3 or w.shape[1:] != (self.num_styles, self.style_dim):
            raise ValueError(f"w has shape {tuple(w.shape)}: expected [batch, {self.num_styles}, {self.style_dim}]")
        dtype = self.dtype or w.dtype
        start = self.input.input[...].astype(dtype)
        x = jnp.broadcast_to(start, (w.shape[0], *start.shape[1:]))
        image = None
        for i, (level, to_rgb) in enumerate(zip(self.layers, self.to_rgbs, strict=True)):
            for j, block in enumerate(level.blocks):
                x = block(x, w[:, 2 * i + j])
            if level.upsample is not None:
                x = level.upsample(x)
            image = to_rgb(x, image)
        return image

    def __call__(self, z: Array) -> Array:
        return self.synthesis(self.mapping(z))
