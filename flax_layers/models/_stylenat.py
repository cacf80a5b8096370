"""The StyleNAT generator: style-based image synthesis with Hydra neighborhood attention.

``z -> mapping network -> w``; from a learned 4x4 constant, each resolution has two blocks modulated by ``w`` (adaptive
instance norm), then a bilinear upsampling; the image is the sum of one RGB projection per resolution.

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

from flax_layers._nnx import MLP, HydraNeighborhoodAttention
from flax_layers.models._vision import EPSILON, kernel_init

Array = Any
Dtype = Any

FIRST_SIZE = 4
# Per resolution, from 4x4 up to 1024x1024.
CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)
WINDOWS = ((3,), *((7,),) * 8)
DILATIONS = ((1,), (1,), (1, 2), (1, 4), (1, 8), (1, 16), (1, 32), (1, 64), (1, 128))


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


class StyleBlock(nnx.Module):
    """A pre-norm transformer block whose norms carry the style."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        windows: Sequence[int],
        dilations: Sequence[int],
        style_dim: int,
        mlp_ratio: float,
        implementation: str | None,
        **options: Any,
    ):
        self.norm1 = AdaptiveInstanceNorm(features, style_dim, **options)
        self.attn = HydraNeighborhoodAttention(
            features,
            num_heads,
            windows,
            dilations,
            rank=2,
            implementation=implementation,
            kernel_init=kernel_init,
            **options,
        )
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
        self.conv = nnx.Linear(features, 3, kernel_init=init, param_dtype=param_dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((3,), param_dtype))
        self.upsample = upsample

    def __call__(self, x: Array, skip: Array | None) -> Array:
        image = self.conv(x.astype(jnp.float32)) + self.bias[...]
        if skip is None:
            return image
        return image + (upsample_image(skip) if self.upsample else skip)


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
      channels, windows, dilations: per resolution from 4x4 up; ``windows`` and ``dilations`` have an entry per head group.
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
        for name, entries in (("channels", channels), ("windows", windows), ("dilations", dilations)):
            if len(entries) < count:
                raise ValueError(f"{name} has {len(entries)} entries, image_size={image_size} needs {count}: 4x4 and up")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "precision": precision, "rngs": rngs}
        self.image_size, self.style_dim, self.num_styles = image_size, style_dim, 2 * count
        self.dtype = dtype
        self.style = nnx.List(
            EqualLinear(style_dim, style_dim, lr_mul=mapping_lr_mul, activate=True, **options) for _ in range(mapping_depth)
        )
        self.input = nnx.Param(jax.random.normal(rngs.params(), (1, FIRST_SIZE, FIRST_SIZE, channels[0]), param_dtype))
        levels, to_rgbs = [], []
        for i in range(count):
            last = i == count - 1
            out_channels = channels[i] if last else channels[i + 1]
            blocks = [
                StyleBlock(
                    channels[i],
                    max(channels[i] // 32, min_heads),
                    windows[i],
                    dilations[i],
                    style_dim,
                    mlp_ratio,
                    implementation,
                    **options,
                )
                for _ in range(2)
            ]
            levels.append(StyleLevel(blocks, None if last else BilinearUpsample(channels[i], out_channels, **options)))
            to_rgbs.append(ToRGB(out_channels, not last, param_dtype, rngs))
        self.layers, self.to_rgbs = nnx.List(levels), nnx.List(to_rgbs)

    def mapping(self, z: Array) -> Array:
        """``z [B, style_dim]`` to one style ``w`` for every block, ``[B, num_styles, style_dim]``."""
        if z.ndim != 2 or z.shape[-1] != self.style_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}: expected [batch, {self.style_dim}]")
        w = z * lax.rsqrt(jnp.mean(z**2, axis=1, keepdims=True) + 1e-8)
        for layer in self.style:
            w = layer(w)
        return jnp.broadcast_to(w[:, None], (w.shape[0], self.num_styles, self.style_dim))

    def synthesis(self, w: Array) -> Array:
        """Styles ``[B, num_styles, style_dim]`` to images; rows of several ``w`` may be mixed."""
        if w.ndim != 3 or w.shape[1:] != (self.num_styles, self.style_dim):
            raise ValueError(f"w has shape {tuple(w.shape)}: expected [batch, {self.num_styles}, {self.style_dim}]")
        dtype = self.dtype or w.dtype
        x = jnp.broadcast_to(self.input[...].astype(dtype), (w.shape[0], *self.input.shape[1:]))
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
