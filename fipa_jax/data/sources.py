"""How are data sets prepared without TensorFlow? From official archives to the form that `loading` reads.

Archives are compared with their known checksums and read where they lie: nothing is unpacked to disk and nothing is
unpickled. The examples keep their archive's own order, by which published lists of indices count. A new data set is an
entry of `SOURCES`, and one of `loading.CHANNEL_STATS`.
"""

import contextlib
import gzip
import http.client
import shutil
import struct
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fipa_jax.data import loading
from fipa_jax.files import digest_of_file, local, replacing
from fipa_jax.lookup import lookup

DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, EOFError)


# Paths of the archives -> (class names, {split: (image, label) in order}); an image is [H, W(, C)] uint8 or encoded.
Reader = Callable[[list[Path]], tuple[list[str], dict[str, Iterable]]]


class Source(NamedTuple):
    """A data set as it is published."""

    version: str  # TFDS's, whose features ours are (with `id` where TFDS has none)
    url: str  # of the archives' folder
    archives: dict[str, str]  # {file name: SHA-256}
    shape: tuple[int, int, int]  # of every image
    encoding: str  # of the prepared images: png, or jpeg as published
    read: Reader


def prepare(name: str, data_dir: str = "", manual_dir: str = "") -> Path:
    """Prepares a data set once, from archives that are downloaded or already there.

    Args:
      name: a key of `SOURCES`.
      data_dir: where prepared data go, archives into `downloads` in it; "" is TFDS's own default.
      manual_dir: the folder with the archives, if they are not to be downloaded.

    Returns:
      The folder of the prepared version; one that was there before is left as it is.

    Raises:
      FileNotFoundError: an archive is not in `manual_dir`.
      ImportError: a package that preparing needs is not installed.
      OSError: there is no network or no room; no half-prepared version is left behind.
      ValueError: the name is not known, or an archive is not the official one.
    """
    source, root = lookup(SOURCES, name, "the data set to prepare"), loading.root(data_dir)
    folder = root / name / source.version
    if (folder / "dataset_info.json").exists():
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder} is there but holds no prepared data set; remove it")
    tfds = loading.import_tfds(f"preparing {name}")
    if manual_dir:
        find, archives = _given, local(manual_dir, "--manual_dir")
    else:
        find, archives = _downloaded, root / "downloads" / name
    class_names, splits = source.read([find(source, file, archives) for file in source.archives])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in loading.import_tfds
        builder = _builder(tfds, name, source, class_names, splits)(data_dir=root, file_format="array_record")
        try:
            builder.download_and_prepare()  # into a temporary folder, renamed at the end
            loading.write_sums(folder)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{folder} cannot be written, and nothing is left of it ({error})") from error
    return folder


def _builder(tfds, dataset: str, source: Source, class_names: list[str], splits: dict[str, Iterable]):
    """Makes a TFDS builder class; TFDS is an optional package, so that there is none at the top of this file."""
    import PIL.Image

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(source.version)
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=source.shape, encoding_format=source.encoding),
                "label": tfds.features.ClassLabel(names=class_names),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
                homepage=source.url,
                disable_shuffling=True,  # records in the order of their keys
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(splits[split]):
                encoded = image if isinstance(image, bytes) else PIL.Image.fromarray(image)
                yield i, {"id": f"{split}_{i:05d}", "image": encoded, "label": label}

    return Builder


def _given(source: Source, file: str, folder: Path) -> Path:
    """The path of an archive that somebody else has downloaded, once it is checked."""
    path = folder / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there; the data set needs {', '.join(source.archives)} from {source.url}"
        )
    _check_sum(source, path, path)
    return path


def _downloaded(source: Source, file: str, folder: Path) -> Path:
    """The path of an archive, once it is checked; it is downloaded if it is not there, and kept if it is whole."""
    path = folder / file
    if path.exists():
        _check_sum(source, path, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        download(f"{source.url}/{file}", temporary, ", ".join(source.archives))
        _check_sum(source, path, temporary)
    return path


def download(url: str, path: Path, archives: str) -> None:
    """Fetches an archive to a path, with a bar that shows how far it is.

    Raises:
      OSError: it cannot be had; the text names all `archives`, and how to bring them in by hand.
    """
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"User-Agent": "fipa_jax"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer, path.open("wb") as out:
            with tqdm.wrapattr(answer, "read", total=answer.length, desc=url.rpartition("/")[2]) as stream:
                shutil.copyfileobj(stream, out, 2**20)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{request.full_url} cannot be downloaded to {path.parent} ({error}): check network and disk, or fetch "
            f"{archives} elsewhere and name their folder by --manual-dir"
        ) from error


def _check_sum(source: Source, path: Path, content: Path) -> None:
    """Refuses an archive, whose content may still stand under a temporary name, that is not the official one."""
    needed, got = source.archives[path.name], digest_of_file(content)
    if got != needed:
        raise ValueError(
            f"{path} is not the official file, or not the whole of it: needed SHA-256 {needed}, got {got} from its "
            f"{content.stat().st_size} bytes; delete it and fetch {source.url}/{path.name}"
        )


@contextlib.contextmanager
def _reading(path):
    """Makes whatever is wrong with an archive a ValueError that names the file."""
    try:
        yield
    except (*DAMAGE, LookupError, ValueError) as error:
        raise ValueError(f"{path} is damaged or laid out in another way than the official file: {error}") from error


def _cifar(folder, train, test, class_names, label_bytes):
    """CIFAR's binary form: records of `label_bytes` labels, the last of them ours, and 3x32x32 pixels."""

    def member(archive, file) -> bytes:
        if (content := archive.extractfile(f"{folder}/{file}")) is None:
            raise ValueError(f"{folder}/{file} is no file")
        return content.read()

    def examples(path, files):
        with _reading(path), tarfile.open(path, "r:gz") as archive:
            for file in files:
                records = np.frombuffer(member(archive, file), np.uint8).reshape(-1, label_bytes + 3072)
                for record in records:
                    yield record[label_bytes:].reshape(3, 32, 32).transpose(1, 2, 0), int(record[label_bytes - 1])

    def read(paths):
        (path,) = paths
        with _reading(path), tarfile.open(path, "r:gz") as archive:
            names = member(archive, class_names).decode().split()
        return names, {"train": examples(path, train), "test": examples(path, test)}

    return read


def _mnist(class_names):
    """MNIST's form: for each split a file of images and one of labels."""

    def array(path, ndim):
        """Reads the form idx: a magic number, the sizes, the bytes."""
        with _reading(path), gzip.open(path) as file:
            content, header = file.read(), struct.Struct(f">{1 + ndim}I")
            magic, *shape = header.unpack_from(content)
            if magic != 0x800 + ndim:
                raise ValueError(f"needed the magic number {0x800 + ndim}, got {magic}")
            return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)

    def examples(images, labels):
        pairs = zip(array(images, 3), array(labels, 1).tolist(), strict=True)
        with _reading(labels):
            yield from pairs

    def read(paths):
        return list(class_names), {"train": examples(*paths[:2]), "test": examples(*paths[2:])}

    return read


def _tiny_imagenet(paths):
    """Tiny-ImageNet-200: JPEG files, class after class of the sorted synsets, each class as its list of boxes goes."""
    (path,) = paths
    top = "tiny-imagenet-200"

    def rows(archive, file):
        return [line.split("\t") for line in archive.read(f"{top}/{file}").decode().splitlines()]

    def train():
        with _reading(path), zipfile.ZipFile(path) as archive:
            for synset, label in labels.items():
                for file, *_ in rows(archive, f"train/{synset}/{synset}_boxes.txt"):
                    yield archive.read(f"{top}/train/{synset}/images/{file}"), label

    def validation():
        with _reading(path), zipfile.ZipFile(path) as archive:
            for file, synset, *_ in rows(archive, "val/val_annotations.txt"):
                yield archive.read(f"{top}/val/images/{file}"), labels[synset]

    with _reading(path), zipfile.ZipFile(path) as archive:
        labels = {synset: k for k, (synset,) in enumerate(sorted(rows(archive, "wnids.txt")))}
    return list(labels), {"train": train(), "validation": validation()}


CIFAR10_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# Checksums: those in TFDS 4.9.10, which lacks Tiny-ImageNet; for that, the one that public repositories agree on.
SOURCES = {
    "cifar10": Source(
        "3.0.2",
        "https://www.cs.toronto.edu/~kriz",
        {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        (32, 32, 3),
        "png",
        _cifar("cifar-10-batches-bin", CIFAR10_TRAIN, ["test_batch.bin"], "batches.meta.txt", label_bytes=1),
    ),
    "cifar100": Source(
        "3.0.2",
        "https://www.cs.toronto.edu/~kriz",
        {"cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
        (32, 32, 3),
        "png",
        _cifar("cifar-100-binary", ["train.bin"], ["test.bin"], "fine_label_names.txt", label_bytes=2),
    ),
    "mnist": Source(
        "3.0.1",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        (28, 28, 1),
        "png",
        _mnist([str(digit) for digit in range(10)]),
    ),
    "fashion_mnist": Source(
        "3.0.1",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        (28, 28, 1),
        "png",
        _mnist(FASHION),
    ),
    "tiny_imagenet": Source(
        "1.0.0",
        "http://cs231n.stanford.edu",
        {"tiny-imagenet-200.zip": "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"},
        (64, 64, 3),
        "jpeg",
        _tiny_imagenet,
    ),
}
