"""Which set of labelled images has a name? One that TFDS has prepared, or one that a Python package brings with it.

A new set of the second kind is an entry of `PACKAGED`; one of the first kind is one of `sources.SOURCES`.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fipa_jax import installed
from fipa_jax.data import loading

SLICE = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")  # train, train[:400], test[100:]


class ImageSet(NamedTuple):
    """How a set of labelled images is read."""

    load: Callable[[str], dict[str, np.ndarray]]  # split -> image [N, H, W, C] uint8, label [N] int32
    classes: Callable[[], list[str]]  # the names of the K classes
    in_original_order: Callable[[], bool]  # whether published lists of indices fit


class Packaged(NamedTuple):
    """A set that a Python package brings."""

    read: Callable[[], dict[str, dict]]  # () -> {split: {field: array}}
    classes: tuple[str, ...]  # their names


def find(name: str, data_dir: str = "", cache_dir: str = "") -> ImageSet:
    """The set of a name; whether it is there shows when it is read.

    Args:
      name: a key of `PACKAGED`, or a TFDS name, with a version or without.
      data_dir, cache_dir: of prepared data, see `loading.load`.

    Example:
      train = find("digits").load("train[:400]")
    """
    if name in PACKAGED:
        packaged = PACKAGED[name]
        return ImageSet(functools.partial(_part, name, packaged.read), lambda: list(packaged.classes), lambda: True)
    return ImageSet(
        functools.partial(loading.load, name, data_dir=data_dir, cache_dir=cache_dir),
        functools.partial(loading.class_names, name, data_dir),
        functools.partial(loading.in_original_order, name, data_dir),
    )


def _part(name: str, read: Callable[[], dict[str, dict]], split: str) -> dict[str, np.ndarray]:
    """A split, or a slice of one, of a packaged set.

    Raises:
      ImportError: the package that brings the set is not installed.
      ValueError: the split is not known or empty.
    """
    splits = read()
    matched = SLICE.fullmatch(split)
    if matched is None or matched[1] not in splits:
        raise ValueError(
            f"config.data: {name} has no split {split!r}; known: {', '.join(splits)}, and slices such as train[:400]"
        )
    start, stop = (int(bound) if bound else None for bound in matched.groups()[1:])
    part = {field: array[start:stop] for field, array in splits[matched[1]].items()}
    if not len(part["label"]):
        raise ValueError(f"config.data: {split!r} of {name} holds no examples; take another slice")
    return part


def _digits() -> dict[str, dict]:
    """1797 handwritten digits of 43 people, 8 x 8 in 17 grey levels, in a border of two pixels; every fifth is a test.

    Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, CC BY 4.0, as scikit-learn brings them (the
    test part of the original). The border makes them large enough for the small CNN. There is no official split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(installed.missing("datasets", "config.data.name = 'digits'", "scikit-learn")) from error
    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    image = np.pad(grey, ((0, 0), (2, 2), (2, 2)))[..., None]
    label, is_test = bunch.target.astype(np.int32), np.arange(len(image)) % 5 == 4
    parts = {"train": ~is_test, "test": is_test}
    return {split: {"image": image[chosen], "label": label[chosen]} for split, chosen in parts.items()}


def _photographs() -> dict[str, dict]:
    """Grey patches of scikit-learn's two photographs, in the shape of its digits: public images, for a private run."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError(
            installed.missing("datasets", "config.data.public = 'photographs'", "scikit-learn")
        ) from error
    patches = []
    for picture in load_sample_images().images:  # [H, W, 3]
        grey = picture.mean(axis=2)
        down, right = grey.shape[0] // 32, grey.shape[1] // 32
        blocks = grey[: 32 * down, : 32 * right].reshape(8 * down, 4, 8 * right, 4).mean(axis=(1, 3))
        patches.append(blocks.reshape(down, 8, right, 8).swapaxes(1, 2).reshape(-1, 8, 8))
    image = np.pad(np.round(np.concatenate(patches)).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))[..., None]
    return {"train": {"image": image, "label": np.zeros(len(image), np.int32)}}


PACKAGED = {
    "digits": Packaged(_digits, tuple("0123456789")),
    "photographs": Packaged(_photographs, ("photograph",)),
}
