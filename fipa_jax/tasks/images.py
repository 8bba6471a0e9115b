"""Image classification: labelled uint8 images, a classifier, and a split of the training set over clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.data import image_sets, loading, partition
from fipa_jax.lookup import lookup
from fipa_jax.models import networks
from fipa_jax.tasks import classification
from fipa_jax.tasks.task import Loss, Problem, Task, means

PADDING = 4  # pixels on each side that a random crop may reach over


def build(config) -> Problem:
    """Builds the task from the data set `config.data`, its split `config.partition` and the model `config.model`.

    Args:
      config: fields read are config.data, config.partition and config.model.

    Returns:
      The problem, its arrays in NumPy: image [N, H, W, C] uint8, label [N] int32.

    Raises:
      FileNotFoundError: the data set is not prepared in config.data.dir.
      ValueError: a field of the config does not fit the data.
    """
    networks.build(config.model, num_outputs=1)  # what is wrong with the config shows before the data are loaded
    loss = lookup(classification.LOSSES, config.data.loss, "config.data.loss")
    fields = {field: config.partition[field] for field in ("alpha", "shards_per_client", "file")}
    partition.check(config.partition.name, **fields)
    images = image_sets.find(config.data.name, config.data.dir, config.data.cache_dir)
    if config.partition.name == "file":
        _check_order(config, images)
    train = images.load(config.data.train_split)
    test = images.load(config.data.test_split or loading.test_split(config.data.name))
    train, test = (arrays | {"image": loading.shrink(arrays["image"], config.data.side)} for arrays in (train, test))
    public = _public(config, train["image"].shape[1:]) if config.data.public else None
    mean, std = loading.standardise(config.data.name, (public or train)["image"])
    train, holdout = partition.set_apart(train, config.data.holdout, config.partition.seed, "config.data.holdout")
    clients = partition.partition(
        config.partition.name,
        train["label"],
        config.partition.num_clients,
        config.partition.seed,
        **fields,
    )
    classes = images.classes()
    module = networks.build(config.model, num_outputs=len(classes))
    augment, rotation, flip = config.data.augment, config.data.rotation, config.data.flip
    task = classifier(module, train["image"].shape[1:], mean, std, augment, rotation, flip, loss)
    return Problem(task, train, test, holdout, clients, classes=classes, public=public)


def _public(config, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The images of `data.public`, in the shape of the others, with labels that mean nothing."""
    found = image_sets.find(config.data.public, config.data.dir, config.data.cache_dir)
    image = loading.shrink(found.load(config.data.public_split)["image"], shape[0])
    if image.shape[1:] != shape:
        raise ValueError(
            f"config.data.public: the images of {config.data.public!r} are {image.shape[1:]}, those of "
            f"{config.data.name!r} {shape}; take another set"
        )
    return {"image": image, "label": np.zeros(len(image), np.int32)}


def _check_order(config, images: image_sets.ImageSet):
    """Refuses published lists of indices where they would not mean the examples that they were made for."""
    name, folder = config.data.name, config.data.dir
    if config.data.holdout or config.data.train_split != "train":
        raise ValueError(
            f"config.partition.file: its lists count the whole training set; set config.data.holdout to 0 (now "
            f"{config.data.holdout}) and config.data.train_split to 'train' (now {config.data.train_split!r})"
        )
    if not images.in_original_order():
        raise ValueError(
            f"config.partition.file: its lists count the examples in their original order, but {name} in {folder!r} "
            f"was prepared in another (TFDS shuffles); prepare it into another folder as scripts/prepare_data.py does"
        )


def classifier(
    module,
    image_shape: tuple[int, int, int],
    mean: np.ndarray,
    std: np.ndarray,
    augmented: bool,
    rotation: float = 0.0,
    flip: bool = True,
    loss: Loss = classification.loss,
) -> Task:
    """Makes the task of classifying uint8 images, by softmax cross-entropy if nothing else is said.

    Args:
      module: flax module from float images [B, H, W, C] to (logits [B, K], features).
      image_shape: (H, W, C).
      mean: [C] channel means of image / 255.
      std: [C] channel standard deviations of image / 255.
      augmented: whether training batches are shown in random views.
      rotation: bound on a view's rotation, in degrees.
      flip: whether half of the views are mirrored.
      loss: of each example, an entry of `classification.LOSSES`.

    Returns:
      The task, on batches {image: [B, H, W, C] uint8, label: [B] int}.
    """

    def init(key):
        return module.init(key, jnp.zeros([1, *image_shape]))["params"]

    def outputs(params, batch):
        dtype = jnp.result_type(*jax.tree.leaves(params))
        scale = jnp.asarray(1 / (255 * std), dtype)[None, None, None]  # [1, 1, 1, C]
        shift = jnp.asarray(-mean / std, dtype)[None, None, None]
        return module.apply({"params": params}, batch["image"].astype(dtype) * scale + shift)

    def augment(key, batch):
        return {**batch, "image": random_view(key, batch["image"], fill, rotation, flip)}

    fill = np.round(255 * mean).astype(np.uint8)
    head = functools.partial(networks.apply_head, module.head_layers)
    pattern = f"^({'|'.join(module.head_layers)})/"
    told = functools.partial(metrics, loss=loss)
    task = Task(init, outputs, loss, told, figures=figures, head=head, head_pattern=pattern)
    return task._replace(augment=augment) if augmented else task


def metrics(outputs: jax.Array, batch: dict, loss: Loss = classification.loss) -> dict[str, jax.Array]:
    """Returns the accuracy (0 or 1), the loss and the predicted class's probability of each example, all [B]."""
    correct = jnp.argmax(outputs, axis=-1) == batch["label"]
    confidence = jnp.max(jax.nn.softmax(outputs, axis=-1), axis=-1)
    return {
        "accuracy": correct.astype(outputs.dtype),
        "loss": loss(outputs, batch),
        "confidence": confidence,
    }


def figures(values: dict) -> dict:
    """{name: []}, the accuracy, the loss and the calibration error of a set of images."""
    of_set = means({name: values[name] for name in ("accuracy", "loss")})
    error = classification.calibration_error(values["confidence"], values["accuracy"])
    return of_set | {"calibration_error": error}


def random_view(key: jax.Array, images: jax.Array, fill: np.ndarray, rotation: float, flip: bool) -> jax.Array:
    """Turns each image by up to `rotation`, shifts it by up to `PADDING` and mirrors half of them, all at random.

    The border is filled with the channel mean, which normalises to zero: the margin then says nothing, as in a
    convolution's own zero padding, whereas black, as in the published recipe, would be a dark edge.

    Args:
      key: the batch's key.
      images: [B, H, W, C] uint8.
      fill: [C] uint8, the border's colour.
      rotation: bound on the angle, in degrees; 0 for none.
      flip: whether to mirror.

    Returns:
      [B, H, W, C] uint8.
    """
    num_images = len(images)
    shift_key, flip_key, angle_key = jax.random.split(key, 3)
    shift = jax.random.randint(shift_key, [2, num_images], -PADDING, PADDING + 1)
    mirror = jax.random.bernoulli(flip_key, flip / 2, [num_images])
    angle = jnp.deg2rad(jax.random.uniform(angle_key, [num_images], minval=-rotation, maxval=rotation))
    return view(images, fill, shift, mirror, angle if rotation else None)


def view(
    images: jax.Array, fill: np.ndarray, shift: jax.Array, mirror: jax.Array, angle: jax.Array | None
) -> jax.Array:
    """Turns images about their centres, shifts them, and mirrors them, in this order and each within the frame.

    What a step moves out of the frame is lost to the next, as in the published recipe; pixels are the nearest ones.

    Args:
      images: [B, H, W, C] uint8.
      fill: [C] uint8, the border's colour.
      shift: [2, B] int, rows and columns that the frame moves down and right.
      mirror: [B] bool.
      angle: [B] radians, clockwise as displayed; None for no rotation, at less work.

    Returns:
      [B, H, W, C] uint8.
    """
    num_images, height, width, channels = images.shape
    down, right = jnp.arange(height)[None], jnp.arange(width)[None]
    rows = (shift[0][:, None] + down)[:, :, None]  # [B, H, 1], of the pixels to fetch
    columns = (shift[1][:, None] + jnp.where(mirror[:, None], right[:, ::-1], right))[:, None, :]  # [B, 1, W]
    if angle is not None:
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # [B, H, W]
        cos, sin = jnp.cos(angle)[:, None, None], jnp.sin(angle)[:, None, None]
        y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
        rows = jnp.round(cos * y - sin * x + (height - 1) / 2).astype(int)
        columns = jnp.round(cos * x + sin * y + (width - 1) / 2).astype(int)
        rows = jnp.where(inside, rows, -1)
    # Whatever lies outside is fetched from a ring of one pixel around the image.
    padded = jnp.broadcast_to(fill, [num_images, height + 2, width + 2, channels]).at[:, 1:-1, 1:-1].set(images)
    rows, columns = jnp.clip(rows, -1, height) + 1, jnp.clip(columns, -1, width) + 1
    # One gather does it all. Under `scan` over steps and `vmap` over clients it is 30 times faster on a CPU than a
    # vmapped dynamic_slice and a flip, and unlike a loop over images it is one kernel on an accelerator.
    return padded.at[jnp.arange(num_images)[:, None, None], rows, columns].get(mode="promise_in_bounds")
