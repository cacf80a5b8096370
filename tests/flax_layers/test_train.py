"""The training command: it learns, resumes to the same numbers, splits batches over devices, and refuses what cannot work."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from flax_layers import _data, _tensor_files, train

SMALL = ["--set", "embed_dim=8", "--set", "depths=[1]", "--set", "num_heads=[1]", "--set", "window_size=3"]
SMALL += ["--set", "dilations=null", "--set", "drop_path_rate=0.1"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Two classes that differ by brightness: 96 images of 16x16."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 2
    images = rng.integers(0, 128, (96, 16, 16, 3)) + labels[:, None, None, None] * 100
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = images.astype(np.uint8)
    np.savez(path, images=images[:64], labels=labels[:64], val_images=images[64:], val_labels=labels[64:])
    return path


def command(arrays, out, *more: str) -> list[str]:
    fixed = ["--model", "nat_mini", "--data", str(arrays), "--out", str(out), "--batch", "16", "--epochs", "3"]
    return [*fixed, "--lr", "0.01", "--warmup", "1", "--workers", "2", *SMALL, *more]


def test_it_learns_and_a_stopped_run_ends_with_the_same_numbers(arrays, tmp_path, capsys):
    accuracy = train.main(command(arrays, tmp_path / "whole"))
    assert accuracy == 1.0
    assert f"on {len(jax.local_devices())} x" in capsys.readouterr().out
    train.main(command(arrays, tmp_path / "parts", "--stop-after", "5"))
    assert not (tmp_path / "parts/weights.safetensors").exists()
    train.main(command(arrays, tmp_path / "parts"))
    whole, parts = (_tensor_files.read(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    for name, tensor in whole.items():
        np.testing.assert_array_equal(parts[name], tensor, err_msg=name)
    lines = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 12
    with pytest.raises(SystemExit, match=r"other arguments: lr: 0.01 then, 0.5 now"):
        train.main([*command(arrays, tmp_path / "parts"), "--lr", "0.5"])


def test_illegal_arguments(arrays, tmp_path):
    with pytest.raises(SystemExit, match="--batch 1000 exceeds the 64 training images"):
        train.main([*command(arrays, tmp_path), "--batch", "1000"])
    if len(jax.local_devices()) > 1:
        with pytest.raises(SystemExit, match="cannot be split over"):
            train.main([*command(arrays, tmp_path), "--batch", "15"])
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        train.main([*command(tmp_path / "nothing", tmp_path)])
    with pytest.raises(ValueError, match="arrays are not resized"):
        train.main([*command(arrays, tmp_path), "--image-size", "32"])


def test_folder_of_images(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for split, count in (("train", 3), ("val", 2)):
        for name, value in (("dark", 20), ("light", 220)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image.fromarray(np.full((30 + i, 40, 3), value, np.uint8)).save(tmp_path / split / name / f"{i}.png")
    training, held_out = _data.load(tmp_path, 16)
    assert (training.classes, len(training), len(held_out)) == (("dark", "light"), 6, 4)
    batches = list(_data.training_batches(training, 4, seed=0, first_step=0, steps=3, workers=2))
    again = list(_data.training_batches(training, 4, seed=0, first_step=1, steps=3, workers=2))
    np.testing.assert_array_equal(batches[1].images, again[0].images)
    for batch in batches:
        assert batch.images.shape == (4, 16, 16, 3)
        np.testing.assert_array_equal(batch.images[:, 0, 0, 0] > 100, batch.labels == 1)
    evaluation = list(_data.evaluation_batches(held_out, 3, workers=2))
    assert [batch.weights.sum() for batch in evaluation] == [3, 1]
    assert sum((batch.labels * batch.weights).sum() for batch in evaluation) == 2
    (tmp_path / "val/new").mkdir()
    with pytest.raises(ValueError, match="classes that the training images lack: new"):
        _data.load(tmp_path, 16)
