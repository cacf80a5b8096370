"""Images and labels for training: a folder per class, or arrays; decoded by threads, in an order that a resumed run repeats."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flax_layers.training import Batch

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
# Part of the shorter side that evaluation crops from the centre, as in the published recipes (224 of 256 pixels).
CENTER_CROP = 0.875


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images. ``example(index, rng)`` is uint8 ``[H, W, C]``: with a generator augmented, without one centred."""

    labels: np.ndarray  # int32 [N]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    example: Callable[[int, np.random.Generator | None], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)


def from_arrays(images: np.ndarray, labels: np.ndarray, classes: int | None = None, flip: bool = False) -> Dataset:
    """``images`` uint8 ``[N, H, W]`` or ``[N, H, W, C]``; ``flip``: augment by horizontal flips."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"images have dtype {images.dtype} and shape {images.shape}: expected uint8 [N, H, W] or [N, H, W, C]"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels have dtype {labels.dtype} and shape {labels.shape}: expected integers [{images.shape[0]}]"
        )
    if len(labels) and labels.min() < 0:
        raise ValueError(f"labels hold {labels.min()}: they start at 0")
    images = images[..., None] if images.ndim == 3 else images
    count = int(labels.max()) + 1 if classes is None else classes

    def example(index: int, rng: np.random.Generator | None) -> np.ndarray:
        image = images[index]
        return image[:, ::-1] if flip and rng is not None and rng.random() < 0.5 else image

    return Dataset(labels.astype(np.int32), tuple(map(str, range(count))), tuple(images.shape[1:]), example)


def from_folder(
    root: pathlib.Path, size: int, *, classes: tuple[str, ...] | None = None, min_scale: float = 0.35
) -> Dataset:
    """``root/<class>/<image>``; training crops a random part of at least ``min_scale`` of the area and flips at random."""
    found = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if not found:
        raise ValueError(f"{root} holds no folders: expected one per class")
    classes = found if classes is None else classes
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"{root} has classes that the training images lack: {', '.join(unknown)}")
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)})")

    def example(index: int, rng: np.random.Generator | None) -> np.ndarray:
        from PIL import Image

        with Image.open(files[index][0]) as opened:
            image = opened.convert("RGB")
        width, height = image.size
        if rng is None:
            side = min(width, height) * CENTER_CROP
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        else:
            area = width * height * rng.uniform(min_scale, 1.0)
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
        array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
        return array[:, ::-1] if rng is not None and rng.random() < 0.5 else array

    return Dataset(np.array([label for _, label in files], np.int32), classes, (size, size, 3), example)


def load(path: str | pathlib.Path, size: int | None) -> tuple[Dataset, Dataset | None]:
    """Training and held-out images.

    A folder holds ``train/<class>/...`` and ``val/<class>/...``, or just ``<class>/...`` (nothing held out). A ``.npz`` holds
    ``images`` (uint8) and ``labels``, and ``val_images`` and ``val_labels`` if some are held out.
    """
    path = pathlib.Path(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            names = {"images", "labels"} - set(arrays.files)
            if names:
                raise ValueError(f"{path} lacks {' and '.join(sorted(names))}; it holds {', '.join(arrays.files)}")
            train = from_arrays(arrays["images"], arrays["labels"], flip=False)
            held_out = None
            if "val_images" in arrays.files:
                held_out = from_arrays(arrays["val_images"], arrays["val_labels"], len(train.classes))
        if size is not None and train.shape[:2] != (size, size):
            raise ValueError(
                f"{path} holds images of {train.shape[0]}x{train.shape[1]}, not {size}x{size}: arrays are not resized"
            )
        return train, held_out
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a folder nor a .npz file")
    size = 224 if size is None else size
    if not (path / "train").is_dir():
        return from_folder(path, size), None
    train = from_folder(path / "train", size)
    return train, from_folder(path / "val", size, classes=train.classes) if (path / "val").is_dir() else None


def _assemble(dataset: Dataset, indices: np.ndarray, rngs: Any, batch_size: int, pool: Any) -> Batch:
    examples = list(pool.map(dataset.example, indices, rngs))
    images = np.zeros((batch_size, *dataset.shape), np.uint8)
    images[: len(examples)] = examples
    labels, weights = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.float32)
    labels[: len(indices)], weights[: len(indices)] = dataset.labels[indices], 1.0
    return Batch(images, labels, weights)


def _prefetched(jobs: Iterator[Callable[[], Batch]], depth: int = 3) -> Iterator[Batch]:
    """Results of the jobs in order, a few ahead."""
    with concurrent.futures.ThreadPoolExecutor(1) as runner:
        waiting: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        for job in jobs:
            waiting.append(runner.submit(job))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def training_batches(
    dataset: Dataset, batch_size: int, *, seed: int, first_step: int, steps: int, workers: int
) -> Iterator[Batch]:
    """Batches ``first_step`` to ``steps - 1`` of a run: a new order every epoch, the last incomplete batch of each left out."""
    per_epoch = len(dataset) // batch_size

    def jobs() -> Iterator[Callable[[], Batch]]:
        order, epoch = np.arange(0), -1
        for step in range(first_step, steps):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
            position = step % per_epoch * batch_size
            indices = order[position : position + batch_size]
            rngs = [np.random.default_rng((seed, epoch, int(index))) for index in indices]
            yield functools.partial(_assemble, dataset, indices, rngs, batch_size, pool)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from _prefetched(jobs())


def evaluation_batches(dataset: Dataset, batch_size: int, *, workers: int) -> Iterator[Batch]:
    """All images once, in order; the last batch is filled with examples of weight 0."""

    def jobs() -> Iterator[Callable[[], Batch]]:
        for first in range(0, len(dataset), batch_size):
            indices = np.arange(first, min(first + batch_size, len(dataset)))
            yield functools.partial(_assemble, dataset, indices, [None] * len(indices), batch_size, pool)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        yield from _prefetched(jobs())
