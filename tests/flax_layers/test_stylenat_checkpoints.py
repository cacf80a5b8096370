"""Checkpoints of StyleNAT: the published names and shapes, read and written, and what they mean, written out in numpy."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from flax import nnx

from flax_layers import checkpoints, models

STYLE = {"image_size": 16, "style_dim": 24, "mapping_depth": 2, "channels": (32, 24, 16), "min_heads": 2, "mlp_ratio": 2.0}
STYLE |= {"windows": ((5,), (5,)), "dilations": ((1,), (1, 3))}


def style_nat(**overrides) -> models.StyleNAT:
    return models.StyleNAT(**(STYLE | overrides), rngs=nnx.Rngs(0))


generate = nnx.jit(lambda model, z: model(z))  # compiled once for all tests


def published_generator(first_release: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a PyTorch generator of this size, written from the published definition."""
    shapes: dict[str, tuple[int, ...]] = {"input.input": (1, 32, 4, 4)}

    def linear(name: str, out: int, features: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, features)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    for i in (1, 2):  # 0 is the norm of z
        linear(f"style.{i}", 24, 24)
    for i, features in enumerate((32, 24, 16)):
        for j in (0, 1):
            block = f"layers.{i}.blocks.{j}"
            linear(f"{block}.norm1.style", 2 * features, 24)
            linear(f"{block}.norm2.style", 2 * features, 24)
            linear(f"{block}.attn.qkv", 3 * features, features)
            linear(f"{block}.attn.proj", features, features)
            linear(f"{block}.mlp.fc1", 2 * features, features)
            linear(f"{block}.mlp.fc2", features, 2 * features)
            if i == 0:
                shapes |= {f"{block}.attn.rpb": (2, 7, 7), f"{block}.attn.relative_position_index": (16, 16)}
            elif first_release:
                shapes |= {f"{block}.attn.rpb{group}": (1, 9, 9) for group in (0, 1)}
            else:
                shapes |= {f"{block}.attn.rpb.{group}": (2 // i, 9, 9) for group in range(i)}
        out = (24, 16, 16)[i]
        if i < 2:
            up = f"layers.{i}.upsample"
            shapes |= {f"{up}.norm.weight": (features,), f"{up}.norm.bias": (features,), f"{up}.alpha": (1,)}
            linear(f"{up}.reduction", out, features, bias=False)
            shapes |= {f"{up}.sin_pos_embed._float_tensor": (1,), f"to_rgbs.{i}.upsample.kernel": (4, 4)}
        shapes |= {
            f"to_rgbs.{i}.conv.weight": (3, out, 1, 1),
            f"to_rgbs.{i}.conv.bias": (3,),
            f"to_rgbs.{i}.bias": (1, 3, 1, 1),
        }
    return shapes


def random_generator(first_release: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = published_generator(first_release)
    return {name: (0.3 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def style_image(t: dict[str, np.ndarray], z: np.ndarray) -> np.ndarray:
    """The published generator in numpy, straight from its tensors ``t``, in float64: image ``[3, 16, 16]`` of one ``z``."""
    erf = np.vectorize(math.erf)

    def lin(name: str, x: np.ndarray, gain: float = 1.0, shift: float = 1.0) -> np.ndarray:
        return x @ (t[f"{name}.weight"] * gain).T + t.get(f"{name}.bias", np.zeros(1)) * shift

    def window(length: int, k: int, d: int) -> np.ndarray:
        """``[length, k]``: the keys of each query on one axis."""
        rows = []
        for x in range(length):
            group = np.arange(x % d, length, d)
            start = min(max(x // d - k // 2, 0), len(group) - k)
            rows.append(group[start : start + k])
        return np.array(rows)

    def attend(q, k, v, bias, keys, d):  # [h, w, D] each, keys [length, k] for both axes
        out = np.empty_like(q)
        reach = bias.shape[-1] // 2
        for y in range(len(q)):
            for x in range(len(q)):
                ky, kx = keys[y], keys[x]
                scores = k[np.ix_(ky, kx)] @ q[y, x] / math.sqrt(q.shape[-1])
                scores = scores + bias[np.ix_((ky - y) // d + reach, (kx - x) // d + reach)]
                e = np.exp(scores - scores.max())
                out[y, x] = np.einsum("yx,yxd->d", e / e.sum(), v[np.ix_(ky, kx)])
        return out

    w = z / np.sqrt((z**2).mean() + 1e-8)
    for i in (1, 2):
        w = lin(f"style.{i}", w, 0.01 / math.sqrt(24), 0.01)
        w = np.where(w > 0, w, 0.2 * w) * math.sqrt(2)
    x = t["input.input"][0].transpose(1, 2, 0).astype(np.float64)
    image = None
    for i in range(3):
        for j in (0, 1):
            block = f"layers.{i}.blocks.{j}"

            def adain(x: np.ndarray, name: str) -> np.ndarray:
                gamma, beta = np.split(lin(name, w, 1 / math.sqrt(24)), 2)
                return gamma * (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + 1e-5) + beta

            size, features = len(x), x.shape[-1]
            q, k, v = (
                part.reshape(size, size, 2, -1)
                for part in np.split(lin(f"{block}.attn.qkv", adain(x, f"{block}.norm1.style")), 3, -1)
            )
            heads = []
            for head in range(2):
                if i == 0:
                    bias, d, keys = t[f"{block}.attn.rpb"][head], 1, np.tile(np.arange(4), (4, 1))
                else:
                    split = f"{block}.attn.rpb{head}" in t
                    stem, row = (f"rpb{head}", 0) if split else ("rpb.0", head) if i == 1 else (f"rpb.{head}", 0)
                    bias, d = t[f"{block}.attn.{stem}"][row], 3 if (i, head) == (2, 1) else 1
                    keys = window(size, 5, d)
                heads.append(attend(q[:, :, head], k[:, :, head], v[:, :, head], bias, keys, d))
            x = x + lin(f"{block}.attn.proj", np.stack(heads, 2).reshape(size, size, features))
            h = lin(f"{block}.mlp.fc1", adain(x, f"{block}.norm2.style"))
            x = x + lin(f"{block}.mlp.fc2", h * 0.5 * (1 + erf(h / math.sqrt(2))))
        if i < 2:
            up, size = f"layers.{i}.upsample", 2 * len(x)
            centre = (np.arange(size) + 0.5) / 2 - 0.5
            low = np.clip(np.floor(centre), 0, size // 2 - 1).astype(int)
            high = np.minimum(low + 1, size // 2 - 1)
            part = np.clip(centre - low, 0, 1)[:, None, None]
            for _ in (0, 1):  # one axis, then the other
                x = (x[low] * (1 - part) + x[high] * part).swapaxes(0, 1)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = lin(f"{up}.reduction", x * t[f"{up}.norm.weight"] + t[f"{up}.norm.bias"])
            half = x.shape[-1] // 4
            angles = np.arange(1, size + 1)[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
            waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
            grid = np.concatenate([np.tile(waves[None], (size, 1, 1)), np.tile(waves[:, None], (1, size, 1))], -1)
            x = x + grid * t[f"{up}.alpha"]
        rgb = f"to_rgbs.{i}"
        share = x @ t[f"{rgb}.conv.weight"][:, :, 0, 0].T + t[f"{rgb}.conv.bias"] + t[f"{rgb}.bias"][0, :, 0, 0]
        if i in (1,):  # zeros between the pixels, then the (1, 3, 3, 1) filter on both axes
            wide = np.zeros((2 * len(image) + 4,) * 2 + (3,))
            wide[2:-2:2, 2:-2:2] = image
            taps = np.array([1, 3, 3, 1]) / 4
            n = 2 * len(image)
            image = sum(taps[a] * taps[b] * wide[a : a + n, b : b + n] for a in range(4) for b in range(4))
        image = share if image is None else share + image
    return image.transpose(2, 0, 1)


@pytest.mark.parametrize("first_release", [False, True])
def test_stylenat_reads_published_checkpoints(first_release, tmp_path):
    tensors = random_generator(first_release)
    z = np.random.default_rng(1).standard_normal((1, 24)).astype(np.float32)
    model = checkpoints.from_state_dict(nnx.eval_shape(style_nat), tensors)
    ours = generate(model, z)[0]
    theirs = style_image(tensors, z[0].astype(np.float64))
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours.transpose(2, 0, 1), theirs, atol=1e-4 * np.abs(theirs).max())

    back = checkpoints.to_state_dict(model)
    assert {name: array.shape for name, array in back.items()} == published_generator(first_release=False)
    checkpoints.save(model, tmp_path / "generator.safetensors")
    again = checkpoints.load_pretrained(style_nat, tmp_path / "generator.safetensors")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    for name, tensor in tensors.items() if not first_release else ():
        if not checkpoints._BUFFERS.search(name):
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_stylenat_lists_all_errors():
    tensors = random_generator(first_release=False)
    tensors["layers.2.blocks.0.attn.rpb.1"] = np.zeros((1, 7, 7), np.float32)
    del tensors["style.2.bias"], tensors["input.input"]
    tensors["style.3.weight"] = np.zeros((24, 24), np.float32)
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.from_state_dict(nnx.eval_shape(style_nat), tensors)
    for part in (
        "4 problems",
        "layers.2.blocks.0.attn.rpb.1: shape (1, 7, 7) in the checkpoint",
        "style.2.bias: missing",
        "input.input: missing",
        "style.3.weight: in the checkpoint, but not in the model",
    ):
        assert part in str(caught.value)
