"""Random views of images against the same done by hand; the task of images of every kind, and split by a file."""

import json

import jax
import numpy as np
import pytest
from scipy import ndimage

from fipa_jax import config as config_lib
from fipa_jax.data import loading as data
from fipa_jax.data import sources as datasets
from fipa_jax.tasks import images

SHAPES = [(9, 9, 3), (8, 8, 1), (6, 11, 3)]  # odd and even sides, grayscale, oblong
BATCH = 12
view = jax.jit(images.view)
random_view = jax.jit(images.random_view, static_argnums=(3, 4))


def batch(shape):
    return np.random.default_rng(len(shape)).integers(1, 256, [BATCH, *shape], dtype=np.uint8)


def fill(shape):
    return np.zeros(shape[-1:], np.uint8)  # the colour of no pixel


def still(**changes):
    """Neither shifted, nor mirrored, nor rotated."""
    quiet = {"shift": np.zeros([2, BATCH], int), "mirror": np.zeros(BATCH, bool), "angle": np.zeros(BATCH)}
    return {**quiet, **changes}


def by_hand(image, fill, shift, mirror, angle):
    """Rotates by SciPy about the centre, cuts a window out of the padded image, mirrors it."""
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (np.array(image.shape[:2]) - 1) / 2
    if angle:
        turned = [
            ndimage.affine_transform(
                channel, matrix, centre - matrix @ centre, order=0, mode="grid-constant", cval=value
            )
            for channel, value in zip(np.moveaxis(image, -1, 0), fill, strict=True)
        ]
        image = np.stack(turned, axis=-1)
    height, width, channels = image.shape
    margin = images.PADDING
    padded = np.broadcast_to(fill, [height + 2 * margin, width + 2 * margin, channels]).copy()
    padded[margin:-margin, margin:-margin] = image
    out = padded[margin + shift[0] :, margin + shift[1] :][:height, :width]
    return out[:, ::-1] if mirror else out


@pytest.mark.parametrize("shape", SHAPES)
def test_a_view_is_rotation_then_shift_then_mirroring(shape):
    rng = np.random.default_rng(1)
    shift = rng.integers(-images.PADDING, images.PADDING + 1, [2, BATCH])
    mirror, angle = rng.random(BATCH) < 0.5, rng.uniform(-0.6, 0.6, BATCH)  # in general position: no ties in rounding
    shown = batch(shape)
    out = np.asarray(view(shown, fill(shape), shift, mirror, angle))
    for b in range(BATCH):
        np.testing.assert_array_equal(out[b], by_hand(shown[b], fill(shape), shift[:, b], mirror[b], angle[b]))


def test_a_rotation_is_that_of_the_published_recipe():
    """torchvision's RandomRotation on a PIL image is PIL's rotation, counter-clockwise, to the nearest pixel."""
    image = pytest.importorskip("PIL.Image")
    shown, angle = batch((32, 32, 3)), np.random.default_rng(4).uniform(-10, 10, BATCH)
    out = np.asarray(view(shown, fill(shown.shape), **still(angle=np.radians(angle))))
    theirs = np.stack([image.fromarray(shown[b]).rotate(-angle[b], image.Resampling.NEAREST) for b in range(BATCH)])
    assert (out != theirs).any(axis=-1).mean() < 2e-3  # PIL rounds its coordinates to fixed point


@pytest.mark.parametrize("shape", SHAPES)
def test_no_rotation_is_a_rotation_by_nothing(shape):
    rng = np.random.default_rng(2)
    shift, mirror = rng.integers(-images.PADDING, images.PADDING + 1, [2, BATCH]), rng.random(BATCH) < 0.5
    without = view(batch(shape), fill(shape), shift, mirror, None)
    np.testing.assert_array_equal(view(batch(shape), fill(shape), shift, mirror, np.zeros(BATCH)), without)
    for b in range(BATCH):
        by_numpy = by_hand(batch(shape)[b], fill(shape), shift[:, b], mirror[b], 0.0)
        np.testing.assert_array_equal(without[b], by_numpy)
    np.testing.assert_array_equal(view(batch(shape), fill(shape), **still()), batch(shape))


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_quarter_turns_are_exact(shape, turns):
    """Clockwise; every pixel of a square stays in it."""
    out = view(batch(shape), fill(shape), **still(angle=np.full(BATCH, turns * np.pi / 2)))
    np.testing.assert_array_equal(out, np.rot90(batch(shape), -turns, axes=(1, 2)))


def test_an_oblong_turned_by_a_quarter_keeps_its_middle():
    shape = (6, 12, 3)
    out = np.asarray(view(batch(shape), fill(shape), **still(angle=np.full(BATCH, np.pi / 2))))
    np.testing.assert_array_equal(out[:, :, 3:9], np.rot90(batch(shape)[:, :, 3:9], -1, axes=(1, 2)))
    assert not out[:, :, :3].any() and not out[:, :, 9:].any()


def test_without_rotation_the_draws_are_those_of_a_rotated_batch():
    """A shift and a mirroring do not depend on whether there is a rotation: one so small that it moves no pixel."""
    shown = batch((8, 8, 1))
    plain = random_view(jax.random.key(0), shown, fill(shown.shape), 0.0, True)
    np.testing.assert_array_equal(random_view(jax.random.key(0), shown, fill(shown.shape), 1e-6, True), plain)


def test_angles_fill_their_range_and_each_image_has_its_own():
    """By the place in which one lit pixel, far from the centre, ends up."""
    size, bound = 101, 10.0
    shown = np.zeros([400, size, size, 1], np.uint8)
    shown[:, 50, 85:88] = 255  # large enough that nearest neighbours do not lose it
    out = np.asarray(random_view(jax.random.key(0), shown, fill(shown.shape), bound, False))[..., 0]
    rows, columns = np.meshgrid(np.arange(size) - 50.0, np.arange(size) - 50.0, indexing="ij")
    weight = (out > 0) / (out > 0).sum(axis=(1, 2), keepdims=True)
    angles = np.degrees(np.arctan2((weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))))
    slack = np.degrees(images.PADDING / (36 - images.PADDING)) + 1  # of the shift
    assert np.abs(angles).max() < bound + slack
    assert abs(angles.mean()) < 1.5 and len(np.unique(angles)) > 100
    variance = bound**2 / 3 + np.degrees(1 / 36) ** 2 * (((2 * images.PADDING + 1) ** 2 - 1) / 12)
    assert angles.std() == pytest.approx(np.sqrt(variance), rel=0.1)


@pytest.mark.parametrize("rotation", [0.0, 10.0])
def test_flip_is_a_choice(rotation):
    """An image that grows to the right still does unless it is mirrored."""
    shown = np.broadcast_to(np.linspace(50, 250, 16).astype(np.uint8)[None, None, :, None], [64, 16, 16, 1])
    grows = lambda out: np.sign(out[:, 8, 10].astype(int) - out[:, 8, 5].astype(int))[:, 0]
    for flip in (False, True):
        out = np.asarray(random_view(jax.random.key(3), shown, fill(shown.shape), rotation, flip))
        assert set(grows(out)) == ({1, -1} if flip else {1})


def image_config(name, folder, **changes):
    config = config_lib.default()
    config.task.name = "images"
    config.data.name, config.data.dir, config.data.cache_dir = name, str(folder / "data"), str(folder / "cache")
    config.model.widths, config.partition.name, config.partition.num_clients = (4,), "iid", 3
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("name", ["mnist", "tiny_imagenet"])
def test_a_task_is_built_from_every_kind(name, official, tmp_path):
    """Grayscale and JPEG, from the split that the data set is tested on."""
    folder, arrays = official(name)
    datasets.prepare(name, tmp_path / "data", folder)
    changes = {"data.flip": name != "mnist", "data.rotation": 10.0, "model.name": "cnn_6k"}
    task, train, test, *_ = images.build(image_config(name, tmp_path, **changes))
    np.testing.assert_array_equal(test["label"], arrays[data.test_split(name)][1])
    batch = task.augment(jax.random.key(0), jax.tree.map(lambda x: x[:4], train))
    assert batch["image"].shape == train["image"][:4].shape
    logits = jax.eval_shape(lambda key: task.outputs(task.init(key), batch)[0], jax.random.key(0))
    assert logits.shape == (4, len(data.class_names(name, str(tmp_path / "data"))))


def test_a_published_split_names_the_examples_of_the_archive(official, tmp_path):
    folder, arrays = official("cifar10")
    datasets.prepare("cifar10", tmp_path / "data", folder)
    split = {"0": [14, 3], "1": [0], "2": [7, 8, 1]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    config = image_config(
        "cifar10", tmp_path, **{"partition.name": "file", "partition.file": str(tmp_path / "split.json")}
    )
    problem = images.build(config)
    for client, indices in split.items():
        owned = problem.train["image"][problem.clients[int(client)]]
        np.testing.assert_array_equal(owned, arrays["train"][0][sorted(indices)])
    for field, value in (("holdout", 0.1), ("train_split", "train[2:]")):
        part = config.copy_and_resolve_references()
        part.data[field] = value
        with pytest.raises(
            ValueError, match=rf"config\.partition\.file: .*config\.data\.{field} to .*now {value!r}"[:-5]
        ):
            images.build(part)


def test_a_published_split_refuses_shuffled_records(official, tmp_path):
    folder, _ = official("cifar10")
    prepared = datasets.prepare("cifar10", tmp_path / "data", folder)
    info = json.loads((prepared / "dataset_info.json").read_text())
    assert info.pop("disableShuffling") is True
    (prepared / "dataset_info.json").write_text(json.dumps(info))  # as TFDS's own builder leaves it
    config = image_config("cifar10", tmp_path, **{"partition.name": "file", "partition.file": "split.json"})
    with pytest.raises(ValueError, match=r"config\.partition\.file: .*original order.*scripts/prepare_data\.py"):
        images.build(config)


def test_digits_are_not_mirrored():
    config = config_lib.default()
    config.task.name, config.data.name = "images", "mnist"
    with pytest.raises(ValueError, match=r"config\.data\.flip"):
        config_lib.validate(config)
    config.data.flip = False
    config_lib.validate(config)
