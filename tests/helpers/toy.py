"""A data set in TFDS's own form, as `tfds build` leaves it: record files and their description."""

import warnings

import numpy as np
import pytest

NUM_CLASSES, SIDE = 3, 8
SPLITS = {"train": 24, "test": 6}


def pixels(split):
    """The images of a split, by their place in its generator: [N, 8, 8, 3]."""
    rng = np.random.default_rng(len(split))
    return rng.integers(0, 256, [SPLITS[split], SIDE, SIDE, 3], dtype=np.uint8)


def prepare(root):
    """Prepares the data set `toy` in a folder; returns the folder."""
    PIL_Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("array_record")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tfds = pytest.importorskip("tensorflow_datasets")

        class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # prepared twice in a session
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = root

            def _info(self):
                image = tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png")
                label = tfds.features.ClassLabel(num_classes=NUM_CLASSES)
                return self.dataset_info_from_configs(
                    features=tfds.features.FeaturesDict({"image": image, "label": label})
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in SPLITS}

            def _generate_examples(self, split):
                for i, image in enumerate(pixels(split)):
                    yield i, {"image": PIL_Image.fromarray(image), "label": i % NUM_CLASSES}

        Toy(data_dir=root, file_format="array_record").download_and_prepare()
    return root
