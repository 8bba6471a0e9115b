"""Small archives in the layouts of the official ones, and what is in them; not tests."""

import functools
import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np

SYNSETS = ["n03", "n01", "n02"]  # not sorted, as in the official list


def draw(split, num_images, *shape):
    rng = np.random.default_rng([num_images, len(split)])
    return rng.integers(0, 256, [num_images, *shape], dtype=np.uint8)


def jpeg(image):
    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="jpeg")
    return buffer.getvalue()


def decoded(content):
    import PIL.Image

    image = np.asarray(PIL.Image.open(io.BytesIO(content)))
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def cifar(folder, label_bytes):
    """A few records a file, in five training files or one; `test` comes first in the archive."""
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if label_bytes == 1 else ["train.bin"]
    top, test = ("cifar-10-batches-bin", "test_batch.bin") if label_bytes == 1 else ("cifar-100-binary", "test.bin")
    arrays, files = {}, {}
    for split, members in (("test", [test]), ("train", train)):
        shown = draw(split, 3 * len(members), 32, 32, 3)
        fine = np.arange(len(shown)) * 7 % (10 if label_bytes == 1 else 100)
        labels = fine[:, None] if label_bytes == 1 else np.stack([fine // 5, fine], axis=1)  # the coarse label first
        records = np.concatenate([labels, shown.transpose(0, 3, 1, 2).reshape(len(shown), -1)], axis=1)
        for member, part in zip(members, np.split(records.astype(np.uint8), len(members)), strict=True):
            files[f"{top}/{member}"] = part.tobytes()
        arrays[split] = shown, fine
    names = "\n".join(f"name{k}" for k in range(10 if label_bytes == 1 else 100)) + "\n\n"
    files[f"{top}/{'batches.meta.txt' if label_bytes == 1 else 'fine_label_names.txt'}"] = names.encode()
    tar(folder / f"cifar-{10 if label_bytes == 1 else 100}-binary.tar.gz", files)
    return arrays


def mnist(folder):
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        shown = draw(split, 12, 28, 28)
        labels = np.arange(12, dtype=np.uint8) % 10
        with gzip.open(folder / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">4I", 2051, *shown.shape) + shown.tobytes())
        with gzip.open(folder / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">2I", 2049, 12) + labels.tobytes())
        arrays[split] = shown[..., None], labels
    return arrays


def tiny_imagenet(folder, per_class=12):
    """Twelve images a class, so that 10 comes after 9 and not after 1; some of them are grayscale."""
    arrays = {"train": ([], []), "validation": ([], [])}
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        top = "tiny-imagenet-200"
        archive.writestr(f"{top}/wnids.txt", "\n".join(SYNSETS) + "\n")
        for label, synset in enumerate(sorted(SYNSETS)):
            names = [f"{synset}_{i}.JPEG" for i in range(per_class)]
            archive.writestr(f"{top}/train/{synset}/{synset}_boxes.txt", "".join(f"{n}\t0\t1\t62\t63\n" for n in names))
            for i, name in enumerate(names):
                image = draw(synset, per_class, 64, 64, 3)[i] // (label + 1)
                content = jpeg(image[..., 0] if i == 1 else image)
                archive.writestr(f"{top}/train/{synset}/images/{name}", content)
                arrays["train"][0].append(decoded(content))
                arrays["train"][1].append(label)
        lines = ""
        for i, image in enumerate(draw("val", 5, 64, 64, 3)):
            content = jpeg(image[..., 0] if i == 1 else image)
            lines += f"val_{i}.JPEG\t{SYNSETS[i % 3]}\t0\t32\t44\t62\n"
            archive.writestr(f"{top}/val/images/val_{i}.JPEG", content)
            arrays["validation"][0].append(decoded(content))
            arrays["validation"][1].append(sorted(SYNSETS).index(SYNSETS[i % 3]))
        archive.writestr(f"{top}/val/val_annotations.txt", lines)
    return {split: (np.stack(shown), np.array(labels)) for split, (shown, labels) in arrays.items()}


MAKERS = {
    "cifar10": functools.partial(cifar, label_bytes=1),
    "cifar100": functools.partial(cifar, label_bytes=2),
    "mnist": mnist,
    "fashion_mnist": mnist,
    "tiny_imagenet": tiny_imagenet,
}
