"""Prepared data sets are loaded, cached and missed as promised; image batches are augmented and normalised right."""

import functools
import os
import socket
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from helpers import toy
from helpers.toy import NUM_CLASSES, SIDE, SPLITS, pixels

from fipa_jax.data import loading as data
from fipa_jax.data import partition
from fipa_jax.tasks import classification, images

REAL_DATA = Path(__file__).resolve().parents[2] / "../shared/data"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return toy.prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to reach the network fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def warned(monkeypatch):
    """The warnings logged in the test."""
    lines = []
    monkeypatch.setattr(data.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def decodings(monkeypatch):
    """The splits decoded, that is not found in the cache, in the test."""
    splits, decode = [], data._decode

    def counted(builder, split, num_examples):
        splits.append(split)
        return decode(builder, split, num_examples)

    monkeypatch.setattr(data, "_decode", counted)
    return splits


def same(a, b):
    return all(np.array_equal(a[field], b[field]) for field in ("image", "label"))


@pytest.mark.parametrize("split", SPLITS)
def test_load_gives_every_image_with_its_label(prepared, tmp_path, offline, split):
    arrays = data.load("toy", split, str(prepared), str(tmp_path))
    assert (arrays["image"].dtype, arrays["label"].dtype) == (np.uint8, np.int32)
    assert arrays["image"].shape == (SPLITS[split], SIDE, SIDE, 3)
    # TFDS shuffles the records: match them by their bytes.
    wanted = {image.tobytes(): i % NUM_CLASSES for i, image in enumerate(pixels(split))}
    assert {i.tobytes(): k for i, k in zip(arrays["image"], arrays["label"], strict=True)} == wanted
    assert len(data.class_names("toy", str(prepared))) == NUM_CLASSES


def test_the_second_load_reads_the_cache(prepared, tmp_path, decodings):
    first = data.load("toy", "train", str(prepared), str(tmp_path))
    second = data.load("toy:1.0.0", "train", str(prepared), str(tmp_path))
    assert decodings == ["train"]
    assert same(first, second)
    assert isinstance(second["image"], np.memmap) and not second["image"].flags.writeable
    # Slices that differ in their brackets alone are not mistaken for one another.
    head, tail = (data.load("toy", s, str(prepared), str(tmp_path)) for s in ("train[:50%]", "train[50%:]"))
    assert same(first, {field: np.concatenate([head[field], tail[field]]) for field in first})
    assert not list(tmp_path.glob("*.partial"))


def test_the_default_cache_follows_the_environment(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data.load("toy", "test", str(prepared))
    assert len(list((tmp_path / "fipa_jax").glob("*.npy"))) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last example: nothing but a digest finds it
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"0")


def garble(path):
    path.write_bytes(b"garbled" * 100)


def empty(path):
    path.write_bytes(b"")


def other_shape(path):
    np.save(path, np.load(path)[1:])


def other_dtype(path):
    np.save(path, np.load(path).astype(np.float32))


@pytest.mark.parametrize("field", ["image", "label"])
@pytest.mark.parametrize("spoil", [flip, truncate, lengthen, garble, empty, other_shape, other_dtype])
def test_a_spoilt_cache_is_noticed_and_rebuilt(prepared, tmp_path, decodings, warned, spoil, field):
    first = data.load("toy", "test", str(prepared), str(tmp_path))
    first = {name: np.array(array) for name, array in first.items()}
    (path,) = tmp_path.glob(f"*.{field}.npy")
    spoil(path)
    assert same(first, data.load("toy", "test", str(prepared), str(tmp_path)))
    assert len(warned) == 1 and "decoding anew" in warned[0] and str(path) in warned[0]
    assert same(first, data.load("toy", "test", str(prepared), str(tmp_path)))
    assert decodings == ["test", "test"]


def test_without_a_writable_cache_the_load_goes_on(prepared, tmp_path, warned):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")  # stops even root, whom permissions do not
    arrays = data.load("toy", "test", str(prepared), str(blocked / "cache"))
    assert len(arrays["label"]) == SPLITS["test"]
    assert any("config.data.cache_dir" in line for line in warned)


def test_data_prepared_anew_is_not_taken_from_the_cache(prepared, tmp_path, decodings):
    data.load("toy", "test", str(prepared), str(tmp_path))
    info = prepared / "toy" / "1.0.0" / "dataset_info.json"
    os.utime(info, ns=(0, info.stat().st_mtime_ns + 1))
    data.load("toy", "test", str(prepared), str(tmp_path))
    assert decodings == ["test", "test"]


@pytest.mark.parametrize(
    ("name", "command"),
    [("cifar10", "scripts/prepare_data.py cifar10 --data-dir="), ("nowhere:2.0.0", "tfds build nowhere")],
)
def test_missing_data_says_at_once_what_to_do(tmp_path, offline, name, command):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=rf"config\.data\.dir .*{command}") as error:
        data.load(name, "train", str(tmp_path))
    assert name in str(error.value) and str(tmp_path) in str(error.value)
    assert time.monotonic() - start < 1


def test_the_default_data_dir_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "mine"))
    with pytest.raises(FileNotFoundError, match="mine"):
        data.load("cifar10", "train")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "PIL"])
def test_missing_packages_are_named(prepared, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs {package}, which the extra fipa_jax.tfds. brings: pip install"):
        data.load("toy", "test", str(prepared))


def test_an_unknown_split_is_an_error_that_lists_the_known(prepared):
    with pytest.raises(ValueError, match=r"config\.data.*validation.*test.*train"):
        data.load("toy", "validation", str(prepared))


def test_standardise_knows_the_published_sets_and_measures_others():
    mean, std = data.standardise("cifar10:3.0.2", np.zeros([0, 1, 1, 3], np.uint8))
    assert mean.tolist() == [0.4914, 0.4822, 0.4465] and std.tolist() == [0.2023, 0.1994, 0.2010]
    many = np.random.default_rng(0).integers(0, 256, [data.BLOCK + 7, 2, 2, 3], dtype=np.uint8)
    many[..., 2] = 9
    mean, std = data.standardise("toy", many)
    np.testing.assert_allclose(mean, (many / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], (many / 255).std((0, 1, 2))[:2], rtol=1e-10)
    assert std[2] == pytest.approx(1 / 255)


@pytest.mark.parametrize("side", [2, 3, 6])
def test_shrink_averages_square_blocks(side):
    images = np.random.default_rng(0).integers(0, 256, [data.BLOCK + 3, 6, 6, 3], dtype=np.uint8)
    small, f = data.shrink(images, side), 6 // side
    assert small.shape == (len(images), side, side, 3) and small.dtype == np.uint8
    n, i, j = data.BLOCK + 1, side - 1, 1
    block = images[n, i * f : (i + 1) * f, j * f : (j + 1) * f].astype(float)
    np.testing.assert_allclose(small[n, i, j], block.mean((0, 1)), atol=0.5 + 1e-4)


@pytest.mark.parametrize(("shape", "side"), [((6, 6), 4), ((6, 4), 2), ((6, 4), 6), ((6, 6), 12)])
def test_shrink_to_what_is_no_divisor_is_an_error(shape, side):
    with pytest.raises(ValueError, match=r"config\.data\.side: needs a divisor"):
        data.shrink(np.zeros([2, *shape, 3], np.uint8), side)


def test_the_real_cifar10_has_its_shape_and_classes(tmp_path, offline):
    if not (REAL_DATA / "cifar10").is_dir():
        pytest.skip(f"needs the prepared CIFAR-10 in {REAL_DATA}")
    pytest.importorskip("tensorflow_datasets")
    arrays = data.load("cifar10", "test[:500]", str(REAL_DATA), str(tmp_path))
    assert arrays["image"].shape == (500, 32, 32, 3)
    assert np.array_equal(np.unique(arrays["label"]), np.arange(10))
    mean, _ = data.standardise("cifar10", arrays["image"])
    np.testing.assert_allclose((arrays["image"] / 255).mean((0, 1, 2)), mean, atol=0.02)


class Flat(nn.Module):
    """A linear classifier that returns its input as its features."""

    head_layers = ("Dense_0",)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(NUM_CLASSES)(x.reshape([x.shape[0], -1])), x


FILL = np.array([10, 20, 30], np.uint8)
MEAN, STD = np.array([0.5, 0.4, 0.3]), np.array([0.25, 0.2, 0.1])
crop_and_flip = jax.jit(functools.partial(images.random_view, rotation=0.0, flip=True))


@pytest.fixture(scope="module")
def batch():
    # Every pixel is unlike every other of its image, and none has the fill's colour.
    grid = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), axis=-1) + 100
    image = np.stack([np.concatenate([grid, np.full([SIDE, SIDE, 1], b)], axis=-1) for b in range(16)])
    return {"image": image.astype(np.uint8), "label": np.arange(16, dtype=np.int32) % NUM_CLASSES}


def test_crop_and_flip_moves_pixels_and_changes_none(batch):
    out = np.asarray(crop_and_flip(jax.random.key(0), batch["image"], FILL))
    assert out.shape == batch["image"].shape and out.dtype == np.uint8
    shifts, flips = set(), set()
    for before, after in zip(batch["image"], out, strict=True):
        padded = np.broadcast_to(FILL, [SIDE + 2 * images.PADDING, SIDE + 2 * images.PADDING, 3]).copy()
        padded[images.PADDING : -images.PADDING, images.PADDING : -images.PADDING] = before
        found = [
            (dy, dx, flip)
            for dy in range(2 * images.PADDING + 1)
            for dx in range(2 * images.PADDING + 1)
            for flip in (1, -1)
            if np.array_equal(padded[dy : dy + SIDE, dx : dx + SIDE][:, ::flip], after)
        ]
        assert len(found) == 1  # one view of the padded image, and only one
        shifts.add(found[0][:2])
        flips.add(found[0][2])
    assert len(shifts) > 5 and flips == {1, -1}  # each image has its own


def test_crop_and_flip_is_a_function_of_the_key(batch):
    first, again, other = (crop_and_flip(jax.random.key(seed), batch["image"], FILL) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("augmented", [True, False])
def test_augment_is_on_request_and_leaves_the_rest_alone(batch, augmented):
    task = images.classifier(Flat(), (SIDE, SIDE, 3), MEAN, STD, augmented)
    out = task.augment(jax.random.key(0), batch)
    assert out["label"] is batch["label"] and out.keys() == batch.keys()
    assert out["image"].dtype == np.uint8
    assert np.array_equal(out["image"], batch["image"]) is not augmented


def test_the_augmented_border_normalises_to_nearly_nothing(batch):
    task = images.classifier(Flat(), (SIDE, SIDE, 3), MEAN, STD, augmented=True)
    params = task.init(jax.random.key(0))
    views = task.augment(jax.random.key(0), batch)
    _, seen = task.outputs(params, views)
    border = np.all(np.asarray(views["image"]) == np.round(255 * MEAN), axis=-1)
    assert border.any()
    assert np.abs(np.asarray(seen)[border]).max() <= 0.5 / 255 / STD.min() + 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_normalise_in_the_dtype_of_the_parameters(batch, dtype):
    task = images.classifier(Flat(), (SIDE, SIDE, 3), MEAN, STD, augmented=False)
    params = jax.tree.map(lambda p: p.astype(dtype), task.init(jax.random.key(0)))
    logits, seen = jax.jit(task.outputs)(params, batch)
    assert seen.dtype == logits.dtype == dtype
    wanted = (batch["image"] / 255 - MEAN) / STD
    np.testing.assert_allclose(np.asarray(seen, np.float64), wanted, atol=20 * float(jnp.finfo(dtype).eps))


def test_loss_and_metrics_are_per_example(batch):
    logits = jax.random.normal(jax.random.key(0), [16, NUM_CLASSES])
    figures = images.metrics(logits, batch)
    wanted = -jax.nn.log_softmax(logits)[np.arange(16), batch["label"]]
    np.testing.assert_allclose(figures["loss"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(classification.loss(logits, batch), figures["loss"])
    np.testing.assert_array_equal(figures["accuracy"], np.argmax(logits, axis=-1) == batch["label"])


def toy_config(prepared, cache_dir, **changes):
    config = ml_collections.ConfigDict(
        {
            "data": {
                "name": "toy",
                "dir": str(prepared),
                "cache_dir": str(cache_dir),
                "train_split": "train",
                "test_split": "test",
                "holdout": 0.25,
                "augment": True,
                "side": 0,
                "rotation": 0.0,
                "flip": True,
                "loss": "cross_entropy",
                "public": "",
            },
            "partition": {"name": "iid", "num_clients": 4, "alpha": 0.5, "shards_per_client": 1, "file": "", "seed": 0},
            "model": {"name": "mlp", "widths": (4,), "activation": "tanh"},
        }
    )
    config.update_from_flattened_dict(changes)
    return config


def test_build_sets_the_holdout_apart_and_learns(prepared, tmp_path):
    problem = images.build(toy_config(prepared, tmp_path))
    task, train, test, holdout, clients, *_ = problem
    classes = problem.classes
    assert (len(train["label"]), len(holdout["label"]), len(test["label"])) == (18, 6, 6)
    assert len(classes) == NUM_CLASSES and all(isinstance(name, str) for name in classes)
    whole = data.load("toy", "train", str(prepared), str(tmp_path))["image"]
    parts = [image.tobytes() for image in (*train["image"], *holdout["image"])]
    assert sorted(parts) == sorted(image.tobytes() for image in whole)
    assert sorted(np.concatenate(clients)) == list(range(18))

    def objective(params):
        return jnp.mean(task.loss(task.outputs(params, train)[0], train))

    params = task.init(jax.random.key(0))
    before, grads = jax.jit(jax.value_and_grad(objective))(params)
    after = objective(optax.apply_updates(params, jax.tree.map(lambda g: -1e-3 * g, grads)))
    assert after < before


def test_the_holdout_depends_on_the_seed_alone(prepared, tmp_path):
    build = lambda **changes: images.build(toy_config(prepared, tmp_path, **changes))
    first = build().holdout
    assert same(first, build(**{"partition.name": "shards", "partition.num_clients": 2}).holdout)
    assert not same(first, build(**{"partition.seed": 1}).holdout)
    whole = build(**{"data.holdout": 0.0})
    assert whole.holdout is None and len(whole.train["label"]) == SPLITS["train"]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_an_impossible_holdout_is_an_error(share):
    with pytest.raises(ValueError, match="holdout"):
        partition.set_apart({"label": np.arange(4)}, share, 0)


@pytest.mark.parametrize(
    ("share", "said"), [(0.01, "0 of them; raise it, or set it to 0"), (0.9, "4 of them; lower it")]
)
def test_a_holdout_of_no_example_or_of_all_is_refused(share, said):
    with pytest.raises(ValueError, match=f"config.task.holdout: {share} of 4 training examples are {said}"):
        partition.set_apart({"label": np.arange(4)}, share, 0, "config.task.holdout")
    train, holdout = partition.set_apart({"label": np.arange(4)}, 0.25, 0)
    assert len(train["label"]) == 3 and len(holdout["label"]) == 1
