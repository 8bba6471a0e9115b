"""Where do arrays come from? Prepared TFDS data sets, decoded once and cached; nothing here reaches the network."""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging

from fipa_jax import installed
from fipa_jax.config.process import user_cache
from fipa_jax.files import SUMS, digest_of_file, local, replacing, sums_of, write

# Channel means and standard deviations of the training images over 255, as the published experiments normalise. (Those
# of CIFAR-10 are means of each image's deviation, a widespread slip: over all pixels they are 0.2470, 0.2435, 0.2616.)
# The names are those of the data sets that `sources.prepare` knows.
CHANNEL_STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "mnist": ((0.1307,), (0.3081,)),
    "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
TEST_SPLITS = {"tiny_imagenet": "validation"}  # where it is not `test`: that of Tiny-ImageNet has no labels
BLOCK = 1024  # images decoded, or summed, at a time
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # under which TFDS names the classes of features


def load(name: str, split: str, data_dir: str = "", cache_dir: str = "") -> dict[str, np.ndarray]:
    """Loads one split of a prepared data set, decoding it only the first time.

    Args:
      name: TFDS name, with a version or without: `cifar10`, `cifar10:3.0.2`.
      split: TFDS split or slice: `train`, `train[:10%]`.
      data_dir: where TFDS prepared the data set; "" is TFDS's own default.
      cache_dir: where the decoded arrays are kept; "" is `fipa_jax` in the user's cache folder.

    Returns:
      image [N, H, W, C] uint8 and label [N] int32, read-only where they are mapped from the cache.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ImportError: a package that reading needs is not installed.
      ValueError: the split is not known or empty, the data set is not one of images with labels, or it is damaged.
    """
    folder = _prepared(name, data_dir)
    builder = _builder(folder)
    if not {"image", "label"} <= set(builder.info.features):
        raise ValueError(
            f"config.data.name: {name} has the fields {sorted(builder.info.features)}, not image and label"
        )
    try:
        num_examples = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"config.data: {name} has no split {split!r}; known: {', '.join(sorted(builder.info.splits))}"
        ) from error
    if num_examples < 1:  # `train[5:3]` counts as -2
        raise ValueError(f"config.data: {split!r} of {name} holds no examples; take another slice")
    cached = _cached(folder, split, cache_dir)
    arrays = _read_cache(cached, num_examples)
    if arrays is None:
        verify(folder)
        arrays = _decode(builder, split, num_examples)
        _write_cache(cached, arrays)
    return arrays


def class_names(name: str, data_dir: str = "") -> list[str]:
    """Returns the names of a prepared data set's classes, numbers where it has none; raises as `load` does."""
    return list(_builder(_prepared(name, data_dir)).info.features["label"].names)


def test_split(name: str) -> str:
    """Returns the name of the split on which results on a data set are reported."""
    return TEST_SPLITS.get(name.partition(":")[0], "test")


def in_original_order(name: str, data_dir: str = "") -> bool:
    """Says whether a prepared data set keeps its archive's order, not TFDS's shuffle; raises as `load` does."""
    return _builder(_prepared(name, data_dir)).info.disable_shuffling


def has_stats(name: str) -> bool:
    """Whether a set's channel means and deviations are known without a look at its images."""
    return name.partition(":")[0] in CHANNEL_STATS


def standardise(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gives the constants of (image / 255 - mean) / std.

    Args:
      name: TFDS name, with a version or without.
      images: [N, H, W, C] uint8 training images, looked at only if `CHANNEL_STATS` lacks the name.

    Returns:
      mean [C] and std [C], float64.
    """
    if (known := CHANNEL_STATS.get(name.partition(":")[0])) is not None:
        return np.array(known[0]), np.array(known[1])
    total = squares = np.zeros(images.shape[-1])
    for start in range(0, len(images), BLOCK):  # in blocks: as floats the whole set may not fit into memory
        block = images[start : start + BLOCK] / 255
        total = total + block.sum(axis=(0, 1, 2))
        squares = squares + np.square(block).sum(axis=(0, 1, 2))
    count = images[..., 0].size
    mean = total / count
    # One grey level at least, for a channel that is constant.
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 255.0**-2))


def root(data_dir: str = "") -> Path:
    """Returns the folder of all prepared data sets: `data_dir`, or TFDS's own default if that is ""."""
    return local(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "config.data.dir")


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Averages images over square blocks of pixels, down to `side` x `side` (a box filter, as Chrabaszcz et al. 2017).

    Args:
      images: [N, H, H, C] uint8.
      side: a divisor of H; 0 or H itself leaves the images as they are.

    Returns:
      [N, side, side, C] uint8.

    Raises:
      ValueError: the images cannot be cut into such blocks.
    """
    num_images, height, width, channels = images.shape
    if side in (0, height) and side in (0, width):
        return images
    if height != width or height % side:
        raise ValueError(f"config.data.side: needs a divisor of the images' side, {height} x {width}, got {side}")
    small = np.empty([num_images, side, side, channels], np.uint8)
    for start in range(0, num_images, BLOCK):
        block = images[start : start + BLOCK].reshape(-1, side, height // side, side, height // side, channels)
        small[start : start + BLOCK] = np.round(block.mean((2, 4), dtype=np.float32))
    return small


def _prepared(name: str, data_dir: str) -> Path:
    """Finds the folder of the newest (or the named) prepared version, without any builder code or network."""
    base, _, version = name.partition(":")
    versions = [info.parent for info in (root(data_dir) / base).glob(f"{version or '[0-9]*'}/dataset_info.json")]
    if not versions:
        raise FileNotFoundError(
            f"the data set {name!r} is not prepared: looked for {root(data_dir) / base / (version or '<version>')}/"
            f"dataset_info.json and found none. Point config.data.dir (now {data_dir!r}; '' means $TFDS_DATA_DIR or "
            f"~/tensorflow_datasets) at the folder that holds {base}/, or prepare the data once, on a machine with "
            f"network: {_recipe(base, root(data_dir))}"
        )
    return max(versions, key=_version_of)


def _version_of(folder: Path) -> list[int]:
    """The version after which a folder is named, as numbers that compare."""
    return [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]


def _recipe(base: str, root: Path) -> str:
    """How a data set is prepared."""
    if base in CHANNEL_STATS:
        return f"python scripts/prepare_data.py {base} --data-dir={root}"
    return f"with tensorflow, tfds build {base} --data_dir={root} --file_format=array_record"


def _builder(folder: Path):
    """Opens a prepared folder with TFDS, whose classes alone may be named in it: TFDS imports what it finds there."""
    tfds = import_tfds(f"reading {folder}")
    with _reading(folder):
        for file in ("features.json", "dataset_info.json"):
            for name in _class_names((folder / file).read_text()):
                if "." in name and not name.startswith("tensorflow_datasets."):
                    raise ValueError(f"{file} names code that is not TFDS's, {name}")
        return tfds.builder_from_directory(folder)


def _class_names(tree) -> Iterator[str]:
    """The names of classes in a tree of JSON, under each key by which TFDS has them, also in texts that are JSON."""
    for key, part in _parts(tree):
        if key in CLASS_KEYS and isinstance(part, str):
            yield part
        else:
            yield from _class_names(part)


def _parts(tree) -> list:
    """(key, part) of the parts of a JSON value; those of a list have no key, a text has the value that it spells."""
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, list):
        return [(None, part) for part in tree]
    if isinstance(tree, str):
        with contextlib.suppress(ValueError):
            return [(None, json.loads(tree))]
    return []


@contextlib.contextmanager
def _reading(folder: Path):
    """Makes whatever is wrong with prepared files a ValueError that names their folder and the way out."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # TFDS, protobuf, array_record and pillow have many
        raise ValueError(
            f"config.data.dir: {folder} is damaged, or a file of it is missing ({' '.join(str(error).split())}); "
            f"remove it and prepare it anew: {_recipe(folder.parent.name, folder.parent.parent)}"
        ) from error


def write_sums(folder: Path) -> None:
    """Writes beside prepared files the digests that `verify` compares."""
    write(folder / SUMS, sums_of(folder))


def verify(folder: Path) -> None:
    """Compares prepared files with their digests, where there are some: TFDS itself writes none.

    array_record's own hashes find a flipped bit, but not a file in another one's place.

    Raises:
      ValueError: a file has changed or is missing.
    """
    with _reading(folder):
        lines = (folder / SUMS).read_text().splitlines() if (folder / SUMS).exists() else []
        for line in lines:
            digest, _, file = line.partition("  ")
            if digest_of_file(folder / file) != digest:
                raise ValueError(f"{file} is not as it was prepared")


def import_tfds(purpose: str):
    """Returns the module tensorflow_datasets, an optional package that nothing else imports.

    Raises:
      ImportError: it, or one of those beside it, is not installed; the text says for what `purpose` it is needed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside TFDS and its imports are no concern of our users
            import array_record  # noqa: F401
            import PIL  # noqa: F401
            import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(installed.missing("tfds", purpose, str(error.name))) from error
    # Once an image run it would advise another package, which changes nothing here.
    logging.get_absl_logger().addFilter(_no_advice)
    return tfds


def _no_advice(record) -> bool:
    """False for TFDS's advice to install OpenCV."""
    return "OpenCV" not in record.getMessage()


def _decode(builder, split: str, num_examples: int) -> dict[str, np.ndarray]:
    """Decodes all images of a split into one array."""
    logging.info("decoding %d images of %s, split %s", num_examples, builder.info.full_name, split)
    folder = Path(builder.data_dir)
    with _reading(folder):
        source = builder.as_data_source(split=split)
        first = source[0]["image"]
    image = np.empty([num_examples, *first.shape], np.uint8)
    label = np.empty([num_examples], np.int32)
    for start in range(0, num_examples, BLOCK):
        with _reading(folder):
            records = source.__getitems__(list(range(start, min(start + BLOCK, num_examples))))
        for i, record in enumerate(records, start):
            if record["image"].shape != first.shape:
                raise ValueError(
                    f"config.data.name: the images of {builder.info.full_name} differ in size, {first.shape} and "
                    f"{record['image'].shape}; choose a data set whose images are all alike"
                )
            image[i], label[i] = record["image"], record["label"]
    return {"image": image, "label": label}


def _cached(folder: Path, split: str, cache_dir: str) -> dict[str, Path]:
    """Names the cache files after the data set, its version, the split, and the fingerprint of the prepared files."""
    root = local(cache_dir, "config.data.cache_dir") if cache_dir else user_cache()
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    fingerprint = hashlib.sha256(repr((split, files)).encode()).hexdigest()[:16]
    stem = "-".join([folder.parent.name, folder.name, re.sub(r"\W+", "_", split), fingerprint])
    return {field: root / f"{stem}.{field}.npy" for field in ("image", "label")}


def _read_cache(cached: dict[str, Path], num_examples: int) -> dict[str, np.ndarray] | None:
    """Maps the cached arrays into memory; None where there are none, or none that are whole."""
    arrays = {}
    for (field, path), dtype, ndim in zip(cached.items(), (np.uint8, np.int32), (4, 1), strict=True):
        try:
            whole = digest_of_file(path) == _sum(path).read_text()
            arrays[field] = array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            logging.warning("decoding anew: the cache %s cannot be read (%s)", path, error)
            return None
        if not whole or (array.dtype, array.ndim, len(array)) != (dtype, ndim, num_examples):
            logging.warning("decoding anew: the cache %s is not as it was written, %d examples", path, num_examples)
            return None
    return arrays


def _sum(path: Path) -> Path:
    """The file beside a cached array that holds its digest."""
    return path.with_suffix(".sha256")


def _write_cache(cached: dict[str, Path], arrays: dict[str, np.ndarray]) -> None:
    """Keeps each array and its digest in files, so that no reader ever sees half of one; warns where it cannot."""
    for field, path in cached.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                with temporary.open("wb") as file:
                    np.save(file, arrays[field], allow_pickle=False)
                digest = digest_of_file(temporary)
            write(_sum(path), digest.encode())
        except OSError as error:
            logging.warning(
                "going on without a cache: %s cannot be written (%s); set config.data.cache_dir", path, error
            )
            return
