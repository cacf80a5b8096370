"""The classifiers built on neighborhood attention: NAT and DiNAT, DiNAT_s, and the isotropic ones.

Attributes carry the names of the published PyTorch checkpoints (``levels.0.blocks.1.attn.rpb``), so that a parameter is
found under the same path there and here.

Sources: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143); Hassani and Shi, "Dilated Neighborhood
Attention Transformer" (arXiv 2209.15001).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_layers._functional import Fit
from flax_layers._nnx import NeighborhoodTransformerBlock

Array = Any
Dtype = Any

EPSILON = 1e-5
kernel_init = nnx.initializers.truncated_normal(0.02)
# A convolution starts as PyTorch's does: uniform within 1 / sqrt(fan in).
conv_init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class _Context:
    """What every submodule of a model is built with: dtypes, precision, random keys."""

    def __init__(self, dtype: Dtype | None, param_dtype: Dtype, precision: Any, rngs: nnx.Rngs):
        self.dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.precision = precision
        self.rngs = rngs

    def norm(self, features: int) -> nnx.LayerNorm:
        return nnx.LayerNorm(features, epsilon=EPSILON, **self.dtypes, rngs=self.rngs)

    def linear(self, in_features: int, out_features: int, use_bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            precision=self.precision,
            **self.dtypes,
            rngs=self.rngs,
        )

    def conv(
        self, in_features: int, out_features: int, size: int, stride: int, padding: int, use_bias: bool = True
    ) -> nnx.Conv:
        return nnx.Conv(
            in_features,
            out_features,
            (size, size),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            use_bias=use_bias,
            kernel_init=conv_init,
            precision=self.precision,
            **self.dtypes,
            rngs=self.rngs,
        )


class ConvTokenizer(nnx.Module):
    """Two 3x3 convolutions of stride 2, then a norm: ``[B, H, W, in] -> [B, H / 4, W / 4, out]``."""

    def __init__(self, in_channels: int, features: int, context: _Context):
        self.proj = nnx.List(
            [context.conv(in_channels, features // 2, 3, 2, 1), context.conv(features // 2, features, 3, 2, 1)]
        )
        self.norm = context.norm(features)

    def __call__(self, x: Array) -> Array:
        for conv in self.proj:
            x = conv(x)
        return self.norm(x)


class PatchEmbedding(nnx.Module):
    """One convolution over patches, then a norm. Sides that are no multiple of the patch are padded with zeros."""

    def __init__(self, in_channels: int, features: int, patch_size: int, context: _Context):
        self.patch_size = patch_size
        self.proj = context.conv(in_channels, features, patch_size, patch_size, 0)
        self.norm = context.norm(features)

    def __call__(self, x: Array) -> Array:
        rest = [-length % self.patch_size for length in x.shape[1:3]]
        if any(rest):
            x = jnp.pad(x, ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0)))
        return self.norm(self.proj(x))


class ConvDownsampler(nnx.Module):
    """A 3x3 convolution of stride 2 that doubles the features, then a norm."""

    def __init__(self, features: int, context: _Context):
        self.reduction = context.conv(features, 2 * features, 3, 2, 1, use_bias=False)
        self.norm = context.norm(2 * features)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.reduction(x))


class PatchMerging(nnx.Module):
    """Four neighbours, in the order (0,0), (1,0), (0,1), (1,1), become one token: a norm, then ``Linear(4 C, 2 C)``."""

    def __init__(self, features: int, context: _Context):
        self.reduction = context.linear(4 * features, 2 * features, use_bias=False)
        self.norm = context.norm(4 * features)

    def __call__(self, x: Array) -> Array:
        _, height, width, _ = x.shape
        if height % 2 or width % 2:
            x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        merged = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        return self.reduction(self.norm(merged))


class Level(nnx.Module):
    """Blocks at one resolution, and the step to the next one."""

    def __init__(self, blocks: Sequence[NeighborhoodTransformerBlock], downsample: nnx.Module | None):
        self.blocks = nnx.List(blocks)
        self.downsample = nnx.data(None) if downsample is None else downsample


def _run_block(block: NeighborhoodTransformerBlock, x: Array, remat: bool, flags: dict[str, Any]) -> Array:
    if not remat:
        return block(x, **flags)
    return nnx.remat(lambda block, x: block(x, **flags))(block, x)


def _depth_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of every block: from 0, linearly, to ``rate``."""
    flat = np.linspace(0.0, rate, sum(depths)).tolist()
    ends = np.cumsum(depths)
    return [flat[end - depth : end] for end, depth in zip(ends, depths, strict=True)]


class _Classifier(nnx.Module):
    """What all classifiers do after their blocks: norm, mean over tokens, head."""

    in_channels: int
    levels_attribute: str
    remat: bool
    patch_embed: Any
    norm: Any
    head: Any

    def _tokens(self, x: Array) -> Array:
        if x.ndim != 4 or x.shape[-1] != self.in_channels:
            raise ValueError(f"input has shape {tuple(x.shape)}: expected [batch, height, width, {self.in_channels}]")
        return self.patch_embed(x)

    def _run(self, x: Array, flags: dict[str, Any]) -> tuple[Array, list[Array]]:
        raise NotImplementedError

    def features(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> list[Array]:
        """Feature maps ``[B, H_i, W_i, C_i]`` of every level, before the step to the next one, without a norm.

        For detection and segmentation; the isotropic models have one level.
        """
        return self._run(x, {"deterministic": deterministic, "rngs": rngs})[1]

    def __call__(self, x: Array, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None) -> Array:
        """Images ``[B, H, W, in_channels]`` to logits ``[B, num_classes]``; without a head, to pooled features."""
        x, _ = self._run(x, {"deterministic": deterministic, "rngs": rngs})
        pooled = jnp.mean(self.norm(x), axis=(1, 2))
        return pooled if self.head is None else self.head(pooled)


class _Hierarchical(_Classifier):
    """Levels of halving resolution and doubling features."""

    def _build(
        self,
        context: _Context,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        dilations: Sequence[Sequence[int]] | None,
        window_size: int,
        drop_path_rate: float,
        num_classes: int,
        downsampler: type[ConvDownsampler] | type[PatchMerging],
        block_options: dict[str, Any],
    ) -> None:
        count = len(depths)
        if len(num_heads) != count or (dilations is not None and len(dilations) != count):
            raise ValueError(
                f"depths={depths!r}, num_heads={num_heads!r} and dilations={dilations!r} need one entry per level"
            )
        rates = _depth_rates(drop_path_rate, depths)
        levels = []
        for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            features = embed_dim * 2**i
            level_dilations = [1] * depth if dilations is None else list(dilations[i])
            if len(level_dilations) != depth:
                raise ValueError(f"dilations[{i}] has {len(level_dilations)} entries for {depth} blocks: one per block")
            blocks = [
                NeighborhoodTransformerBlock(
                    features,
                    heads,
                    (window_size, window_size),
                    dilation=dilation,
                    drop_path_rate=rate,
                    relative_bias=True,
                    epsilon=EPSILON,
                    kernel_init=kernel_init,
                    precision=context.precision,
                    **context.dtypes,
                    **block_options,
                    rngs=context.rngs,
                )
                for dilation, rate in zip(level_dilations, rates[i], strict=True)
            ]
            levels.append(Level(blocks, downsampler(features, context) if i < count - 1 else None))
        setattr(self, self.levels_attribute, nnx.List(levels))
        self.num_features = embed_dim * 2 ** (count - 1)
        self.norm = context.norm(self.num_features)
        self.head = context.linear(self.num_features, num_classes) if num_classes else nnx.data(None)

    def _run(self, x: Array, flags: dict[str, Any]) -> tuple[Array, list[Array]]:
        x = self._tokens(x)
        features = []
        for level in getattr(self, self.levels_attribute):
            for block in level.blocks:
                x = _run_block(block, x, self.remat, flags)
            features.append(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return x, features


class NAT(_Hierarchical):
    """NAT and, with dilations, DiNAT: convolutional tokenizer and downsamplers.

    Args:
      embed_dim: features of the first level; they double from level to level.
      depths, num_heads: blocks and heads per level.
      mlp_ratio, layer_scale, drop_path_rate: of the blocks; stochastic depth grows linearly from 0 to ``drop_path_rate``.
      window_size: on both axes of every level.
      dilations: one per block and level; ``None``: all 1.
      num_classes: 0 leaves the head out.
      in_channels: of the images.
      dropout_rate, attention_dropout_rate: see :class:`flax_layers.NeighborhoodTransformerBlock`.
      fit: what happens on levels smaller than ``window_size * dilation``, see :class:`flax_layers.NeighborhoodAttention`:
        ``"shrink"`` (a smaller dilation, with a warning that names it), ``"pad"`` (as the published code), ``"error"``.
      implementation: of the attention, as in :func:`jax_na.neighborhood_attention`.
      remat: recompute each block's activations in the backward pass.
      dtype, param_dtype, precision, rngs: as in Flax layers; ``dtype=jnp.bfloat16`` computes in bfloat16 with float32
        parameters.
    """

    levels_attribute = "levels"

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        drop_path_rate: float = 0.2,
        layer_scale: float | None = None,
        window_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        fit: Fit = "shrink",
        implementation: str | None = None,
        remat: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        context = _Context(dtype, param_dtype, precision, rngs)
        self.in_channels, self.remat = in_channels, remat
        self.patch_embed = ConvTokenizer(in_channels, embed_dim, context)
        self._build(
            context,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            dilations=dilations,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            downsampler=ConvDownsampler,
            block_options={
                "mlp_ratio": mlp_ratio,
                "layer_scale": layer_scale,
                "dropout_rate": dropout_rate,
                "attention_dropout_rate": attention_dropout_rate,
                "fit": fit,
                "implementation": implementation,
            },
        )


class DiNATs(_Hierarchical):
    """DiNAT_s: the Swin skeleton, with a patch embedding and patch merging. Arguments as in :class:`NAT`."""

    levels_attribute = "layers"

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        window_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        patch_size: int = 4,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        fit: Fit = "shrink",
        implementation: str | None = None,
        remat: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        context = _Context(dtype, param_dtype, precision, rngs)
        self.in_channels, self.remat = in_channels, remat
        self.patch_embed = PatchEmbedding(in_channels, embed_dim, patch_size, context)
        self._build(
            context,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            dilations=dilations,
            window_size=window_size,
            drop_path_rate=drop_path_rate,
            num_classes=num_classes,
            downsampler=PatchMerging,
            block_options={
                "mlp_ratio": mlp_ratio,
                "dropout_rate": dropout_rate,
                "attention_dropout_rate": attention_dropout_rate,
                "fit": fit,
                "implementation": implementation,
            },
        )


class Isotropic(_Classifier):
    """Isotropic NAT and DiNAT: a patch embedding and blocks of one resolution. Arguments as in :class:`NAT`.

    ``dilations`` are repeated over the depth: ``(1, 2)`` alternates.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        window_size: int = 7,
        dilations: Sequence[int] = (1,),
        patch_size: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout_rate: float = 0.0,
        attention_dropout_rate: float = 0.0,
        fit: Fit = "shrink",
        implementation: str | None = None,
        remat: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        context = _Context(dtype, param_dtype, precision, rngs)
        self.in_channels, self.remat, self.num_features = in_channels, remat, embed_dim
        self.patch_embed = PatchEmbedding(in_channels, embed_dim, patch_size, context)
        self.layers = nnx.List(
            NeighborhoodTransformerBlock(
                embed_dim,
                num_heads,
                (window_size, window_size),
                dilation=dilations[i % len(dilations)],
                mlp_ratio=mlp_ratio,
                drop_path_rate=rate,
                dropout_rate=dropout_rate,
                attention_dropout_rate=attention_dropout_rate,
                relative_bias=True,
                fit=fit,
                implementation=implementation,
                epsilon=EPSILON,
                kernel_init=kernel_init,
                precision=precision,
                **context.dtypes,
                rngs=rngs,
            )
            for i, rate in enumerate(_depth_rates(drop_path_rate, [depth])[0])
        )
        self.norm = context.norm(embed_dim)
        self.head = context.linear(embed_dim, num_classes) if num_classes else nnx.data(None)

    def _run(self, x: Array, flags: dict[str, Any]) -> tuple[Array, list[Array]]:
        x = self._tokens(x)
        for block in self.layers:
            x = _run_block(block, x, self.remat, flags)
        return x, [x]
