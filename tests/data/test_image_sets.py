"""A set of images that a Python package brings is read like a prepared one: by split and slice, with clear errors."""

import builtins

import numpy as np
import pytest
from helpers import toy

from fipa_jax import config as config_lib
from fipa_jax.config import checks, recipes
from fipa_jax.data import image_sets
from fipa_jax.tasks import images

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn brings the digits")


def test_the_digits_are_those_of_scikit_learn_each_in_one_split():
    digits = image_sets.find("digits")
    parts = [digits.load(split) for split in ("train", "test")]
    bunch = sklearn_datasets.load_digits()
    assert sum(len(part["label"]) for part in parts) == len(bunch.target)
    grey = np.concatenate([part["image"] for part in parts])[:, 2:-2, 2:-2, 0] / 255 * 16
    found = sorted(zip(np.round(grey).reshape(len(grey), -1).tolist(), _labels(parts), strict=True))
    assert found == sorted(zip(bunch.images.reshape(len(grey), -1).tolist(), bunch.target.tolist(), strict=True))
    assert all(set(part["label"]) == set(range(len(digits.classes()))) for part in parts)
    border = np.concatenate([part["image"] for part in parts]).astype(int)
    border[:, 2:-2, 2:-2] = 0
    assert not border.any()


def test_public_photographs_have_the_digits_shape():
    photographs, digits = (image_sets.find(name).load("train")["image"] for name in ("photographs", "digits"))
    assert photographs.shape[1:] == digits.shape[1:] and photographs.dtype == digits.dtype
    whole = np.mean([picture.mean() for picture in sklearn_datasets.load_sample_images().images])
    assert abs(photographs[:, 2:-2, 2:-2].mean() - whole) < 3  # but for the edges, which make no whole patch


def test_images_that_are_nobodys_come_in_the_shape_of_the_others():
    config = recipes.images("digits", "cnn_6k")
    config.data.augment, config.data.public, config.data.public_split, config.data.side = (
        False,
        "photographs",
        "train[:9]",
        6,
    )
    config.model.name, config.model.widths, config.partition.num_clients, config.cohort = "mlp", (), 4, 2
    problem = images.build(config)
    assert problem.public["image"].shape == (9, 6, 6, 1) and problem.public["label"].shape == (9,)
    config.data.public = "digits"
    config.data.public_split = "validation"
    with pytest.raises(ValueError, match="has no split 'validation'"):
        images.build(config)


def _labels(parts):
    return np.concatenate([part["label"] for part in parts]).tolist()


def test_a_slice_is_a_part_of_its_split():
    digits = image_sets.find("digits")
    whole = digits.load("train")
    for split, part in {"train[:7]": slice(7), "train[5:]": slice(5, None), "train[2:9]": slice(2, 9)}.items():
        for field, array in digits.load(split).items():
            np.testing.assert_array_equal(array, whole[field][part])


@pytest.mark.parametrize("split", ["validation", "train[5:3]", "train[:10%]", "train[-3:]", ""])
def test_what_is_no_split_says_what_is(split):
    with pytest.raises(ValueError, match=r"config\.data: .*(known: train, test|holds no examples)"):
        image_sets.find("digits").load(split)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no module", name="sklearn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"needs scikit-learn, which the extra fipa_jax\[datasets\] brings: pip install"
    ):
        image_sets.find("digits").load("train")


def test_a_prepared_set_is_found_as_it_is_loaded(tmp_path):
    folder = toy.prepare(tmp_path)
    found = image_sets.find("toy", str(folder), str(tmp_path / "cache"))
    assert len(found.classes()) == toy.NUM_CLASSES
    assert len(found.load("train")["label"]) == len(toy.pixels("train"))


def test_digits_are_not_mirrored():
    config = recipes.images("digits", "cnn_6k")
    with pytest.raises(ValueError, match=r"config\.data\.flip: a mirrored digit"):
        checks.validate(config)
    config.data.augment = False
    config.partition.num_clients, config.cohort = 4, 2
    checks.validate(config)
    problem = images.build(config)
    assert problem.train["image"].shape[1:] == (12, 12, 1) and len(problem.clients) == 4


def test_the_default_config_names_a_set_that_can_be_found():
    assert image_sets.find(config_lib.default().data.name)
