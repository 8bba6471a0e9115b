"""Regression or classification on a user's own data, split over clients by a column, by clusters, or as they say."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging
from scipy.cluster.vq import ClusterError, kmeans2

from fipa_jax.data.own_arrays import read, refuse
from fipa_jax.data.partition import Ragged, by_owner, set_apart
from fipa_jax.data.tables import Columns
from fipa_jax.lookup import lookup
from fipa_jax.models import networks
from fipa_jax.tasks import classification
from fipa_jax.tasks.regression import of_vectors, pack, regression
from fipa_jax.tasks.task import Problem, Task

KMEANS_STEPS = 30
FEW = 5  # examples of a client, below which a person is told
BY_TARGETS = ("client", "pooled")  # of `STANDARDS`, those with which numbers to learn are standardised too
FEW_VALUES = 20  # different whole numbers in a target, up to which they may be classes
Examples = tuple[np.ndarray, np.ndarray]  # (x [N, d], y [N, K], or [N] of words)
# (task, x [N, d], client [N] or None) -> [N] owners, the clients in the order of their values
OwnerOf = Callable[..., np.ndarray]


class Target(NamedTuple):
    """What is to be learned of the targets."""

    num_outputs: int
    fields: dict[str, dict[str, np.ndarray]]  # set -> {"y": [N, K]} or {"label": [N]}
    make: Callable  # (module, an input [d]) -> Task
    classes: tuple[str, ...]
    names: tuple[str, ...]  # of the numbers to learn
    baseline: tuple[str, dict]  # see Problem


def build(config) -> Problem:
    """Builds the task `own_data` from the file `config.task.file`, see `own_arrays.read`.

    `config.task.test_fraction` of the examples is set apart, unless the file holds x_test and y_test, and of the others
    `config.task.holdout`. Targets of numbers are learned by half-squared error, classes by cross-entropy: of one logit
    where there are two, of K where there are K.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, what it holds does not fit together, or a split asked for does not exist.
    """
    task, dtype = config.task, np.dtype(config.precision)
    lookup(SPLITS, task.split, "config.task.split")  # a mistake in the name shows before the file is read
    kind = lookup(KINDS, task.kind, "config.task.kind")
    standardise = lookup(STANDARDS, task.standardise, "config.task.standardise")
    columns = Columns(tuple(task.targets), tuple(task.inputs), task.client)
    sets = _sets(read(task.file, columns), task)
    clients = split(task, sets["train"]["x"], sets["train"].get("client"))
    target = kind(task, {name: of_set["y"] for name, of_set in sets.items() if "y" in of_set})
    inputs = standardise(task, sets)
    with np.errstate(over="ignore"):  # which is an error of the file's, below
        data = {name: _packed(inputs[name], fields, dtype) for name, fields in target.fields.items()}
    for of_set in data.values():
        for name, array in of_set.items():
            if not np.all(np.isfinite(array)):
                refuse(task.file, f"holds {name} too large for config.precision = {config.precision!r}; scale it down")
    _warn_of_small(clients)
    module = networks.build(config.model, num_outputs=target.num_outputs)
    return Problem(
        task=target.make(module, data["train"]["x"][0]),
        train=data["train"],
        test=data["test"],
        holdout=data.get("holdout"),
        clients=clients,
        test_clients=_of_the_same(sets, task.split),
        names=tuple(map(str, np.unique(sets["train"]["client"]))) if task.split == "given" else (),
        classes=target.classes,
        targets=target.names,
        baseline=target.baseline,
        public=_public(inputs, data["train"]),
    )


def _public(inputs: dict[str, np.ndarray], train: dict[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The file's x_public in the fields of the training set, with targets that mean nothing; None without them."""
    if "public" not in inputs:
        return None
    x = inputs["public"].astype(train["x"].dtype)
    return {name: np.zeros([len(x), *array.shape[1:]], array.dtype) for name, array in train.items()} | {"x": x}


def classifier(module, example: np.ndarray) -> Task:
    """A task from a flax module: the cross-entropy of its logits, [B, K] or, of two classes, [B, 1]."""
    return of_vectors(module, example, classification.loss, classification.metrics, classification.figures)


def _regression(task, y: dict[str, np.ndarray]) -> Target:
    """Numbers to learn, {set: [N, K]}."""
    if y["train"].dtype.kind == "U":
        refuse(task.file, "has words as targets: set config.task.kind to 'classes', or leave it at 'auto'")
    if task.standardise in BY_TARGETS:
        y = _standardise(y)
    mean, number = y["train"].mean(0), y["train"].shape[1]
    figures = {"mse": float(np.mean((y["test"] - mean) ** 2))}
    fields = {name: {"y": values} for name, values in y.items()}
    named = tuple(task.targets) or (("y",) if number == 1 else tuple(f"y{i + 1}" for i in range(number)))
    if task.standardise in BY_TARGETS:
        named = tuple(f"{name}, standardised" for name in named)
    return Target(number, fields, regression, (), named, ("the mean of the training targets", figures))


def _classes(task, y: dict[str, np.ndarray]) -> Target:
    """Classes to learn, by words or whole numbers, {set: [N] or [N, 1]}."""
    words = {name: _as_words(task.file, values) for name, values in y.items()}
    classes, first = np.unique(words["train"], return_inverse=True)
    if len(classes) < 2:
        refuse(task.file, f"has one class alone to train on, {str(classes[0])!r}; there need to be two")
    if y["train"].dtype.kind != "U":  # in the order of the numbers, not of their names
        by_number = np.argsort(classes.astype(np.float64))
        classes, first = classes[by_number], np.argsort(by_number)[first]
    place = {name: i for i, name in enumerate(classes)}
    unknown = sorted({word for values in words.values() for word in np.unique(values)} - {*place})
    if unknown:
        refuse(
            task.file,
            f"has a class {str(unknown[0])!r} that is in no example to train on; drop it, or lower test_fraction",
        )
    labels = {name: np.array([place[word] for word in values], np.int32) for name, values in words.items()}
    most, figures = classification.of_the_largest_class(labels["train"], labels["test"], len(classes))
    fields = {name: {"label": label} for name, label in labels.items()}
    outputs = 1 if len(classes) == 2 else len(classes)
    baseline = (f"always the largest class, {classes[most]}", figures)
    return Target(outputs, fields, classifier, tuple(classes.tolist()), (), baseline)


def _auto(task, y: dict[str, np.ndarray]) -> Target:
    """Words are classes, numbers are targets of a regression; said where they look like classes."""
    train = y["train"]
    if train.dtype.kind == "U":
        return _classes(task, y)
    values = np.unique(train)
    if train.shape[1] == 1 and len(values) <= FEW_VALUES and np.all(values == np.round(values)):
        logging.warning(
            "the targets are %d different whole numbers, and learned as numbers: if they are classes, set "
            "--config.task.kind=classes (else regression)",
            len(values),
        )
    return _regression(task, y)


KINDS: dict[str, Callable[..., Target]] = {"auto": _auto, "classes": _classes, "regression": _regression}


def _as_words(file: str, y: np.ndarray) -> np.ndarray:
    """[N], the names of the classes in y, [N] of words or [N, 1] of whole numbers."""
    if y.dtype.kind == "U":
        return y
    if y.shape[1] > 1:
        refuse(
            file, f"has {y.shape[1]} targets for each example; classes need one: set config.task.kind to 'regression'"
        )
    if np.any(np.abs(y) >= 2**53):
        refuse(file, "has classes of 2^53 and above, which float64 does not tell apart; name them by words")
    if np.any(y != np.round(y)):
        refuse(file, "has targets that are no whole numbers; classes need to be: set config.task.kind to 'regression'")
    return y[:, 0].astype(np.int64).astype(str)


def _as_it_is(task, sets: dict) -> dict[str, np.ndarray]:
    """{set: x}."""
    return {name: of_set["x"] for name, of_set in sets.items()}


def _by_all(task, sets: dict) -> dict[str, np.ndarray]:
    """{set: x} by the moments of all training examples, of which clients need to tell their sums alone."""
    return _standardise(_as_it_is(task, sets))


def _by_each_client(task, sets: dict) -> dict[str, np.ndarray]:
    """{set: x} of each client by the moments of its own training examples; what all of them share becomes 0."""
    sets = {name: of_set for name, of_set in sets.items() if name != "public"}
    if task.split != "given" or not all("client" in of_set for of_set in sets.values()):
        raise ValueError(
            "config.task.standardise: 'client' needs config.task.split = 'given' and a file that says whose each "
            "example is, test examples too (client_test, or no x_test)"
        )
    result = _as_it_is(task, sets)
    for client in np.unique(sets["train"]["client"]):
        own = {name: of_set["client"] == client for name, of_set in sets.items()}
        for name, x in _standardise({name: result[name][rows] for name, rows in own.items()}, centred=True).items():
            result[name] = result[name].copy()
            result[name][own[name]] = x
    return result


def _by_public(task, sets: dict) -> dict[str, np.ndarray]:
    """{set: x} by the moments of the file's x_public, which say nothing of the clients."""
    if "public" not in sets:
        raise ValueError("config.task.standardise: 'public' needs an array x_public [N, d] in config.task.file")
    return _standardise(_as_it_is(task, sets), by="public")


STANDARDS: dict[str, Callable] = {
    "client": _by_each_client,
    "none": _as_it_is,
    "pooled": _by_all,
    "public": _by_public,
}


def _packed(x: np.ndarray, fields: dict[str, np.ndarray], dtype) -> dict[str, np.ndarray]:
    """Inputs [N, d] and targets as the fields of a data set, in the run's precision."""
    return pack(x, fields["y"], dtype) if "y" in fields else {"x": x.astype(dtype), **fields}


def _of_the_same(sets: dict, split: str) -> list[np.ndarray] | None:
    """Of each client the indices of its examples in the test set; None where that does not say whose they are."""
    if "client" not in sets["test"] or split != "given":
        return None
    return [np.flatnonzero(sets["test"]["client"] == client) for client in np.unique(sets["train"]["client"])]


def _warn_of_small(clients: Ragged) -> None:
    """Says which clients have so few examples that their updates are hardly more than noise."""
    small = {place: len(indices) for place, indices in enumerate(clients) if len(indices) < FEW}
    if small:
        shown = ", ".join(f"{place} ({number})" for place, number in list(small.items())[:10])
        logging.warning("clients with fewer than %d examples: %s%s", FEW, shown, " ..." if len(small) > 10 else "")


def split(task, x: np.ndarray, client: np.ndarray | None) -> Ragged:
    """For each client the indices of its examples, by the split `task.split`, a key of `SPLITS`.

    Args:
      task: with the fields num_clients, split, column, seed and file.
      x: [N, d], of the training set.
      client: [N] owners' ids of the training set, or None.

    Raises:
      ValueError: the split's column or array is not there, or a client would own nothing.
    """
    if task.split != "given" and len(x) < task.num_clients:
        raise ValueError(
            f"config.task.num_clients: {task.num_clients} clients need an example each, but config.task.file has "
            f"{len(x)} to train on; lower it"
        )
    return by_owner(SPLITS[task.split](task, x, client))


def _by_column(task, x: np.ndarray, client: np.ndarray | None) -> np.ndarray:
    """[N] owners: one for each value of a column, or for each quantile bin of it."""
    if not 0 <= task.column < x.shape[1]:
        raise ValueError(
            f"config.task.column: x of config.task.file has columns 0 to {x.shape[1] - 1}, got {task.column}"
        )
    values, owner = np.unique(x[:, task.column], return_inverse=True)
    if len(values) <= task.num_clients:
        return owner
    edges = np.quantile(x[:, task.column], np.arange(1, task.num_clients) / task.num_clients)
    owner = np.searchsorted(edges, x[:, task.column], side="right")
    if len(np.unique(owner)) < task.num_clients:
        raise ValueError(
            f"config.task.num_clients: column {task.column} of x repeats some values so often that of "
            f"{task.num_clients} quantile bins only {len(np.unique(owner))} hold examples; lower it"
        )
    return owner


def _by_kmeans(task, x: np.ndarray, client: np.ndarray | None) -> np.ndarray:
    """[N] owners: clusters of the standardised x, by Lloyd's algorithm from the centres of k-means++."""
    x, draw = _standardise({"train": x})["train"], np.random.default_rng(task.seed)
    options = {"iter": KMEANS_STEPS, "minit": "++", "missing": "raise", "rng": draw}
    try:
        # k-means++ divides by zero where there are fewer places than centres.
        enough = len(np.unique(x, axis=0)) >= task.num_clients
        owner = kmeans2(x, task.num_clients, **options)[1] if enough else np.zeros(len(x), int)
    except ClusterError:
        owner = np.zeros(len(x), int)
    if len(np.unique(owner)) < task.num_clients:
        raise ValueError(
            f"config.task.num_clients: of {task.num_clients} clusters of x in config.task.file some have no example; "
            "lower it"
        )
    return owner


def _by_client(task, x: np.ndarray, client: np.ndarray | None) -> np.ndarray:
    """[N] owners, as the file says them."""
    if client is None:
        raise ValueError(
            f"config.task.split: 'given' needs an array client [N] in config.task.file, {task.file!r}, or a table's "
            f"column config.task.client; add it, or use one of {', '.join(sorted(set(SPLITS) - {'given'}))}"
        )
    return client


SPLITS: dict[str, OwnerOf] = {"column": _by_column, "given": _by_client, "kmeans": _by_kmeans}


def _sets(arrays: dict, task) -> dict[str, dict[str, np.ndarray]]:
    """{"train", "test", "holdout": {x, y, and where it is known client}}; the test set is the file's, or drawn."""
    names = [name for name in ("x", "y", "client") if name in arrays]
    rows = {name: arrays[name] for name in names}
    if "x_test" in arrays:
        train, test = rows, {name: arrays[f"{name}_test"] for name in names if f"{name}_test" in arrays}
    else:
        order = np.random.default_rng(task.seed).permutation(len(rows["x"]))
        count = max(1, round(task.test_fraction * len(order)))
        if count == len(order):
            refuse(
                task.file,
                f"has {count} examples, of which config.task.test_fraction = {task.test_fraction} leaves none",
            )
        test, train = ({name: rows[name][np.sort(part)] for name in names} for part in (order[:count], order[count:]))
    train, holdout = set_apart(train, task.holdout, task.seed, "config.task.holdout")
    if task.split == "given" and "client" in rows:
        _check_all_train(task.file, rows["client"], train["client"])
    sets = {"train": train, "test": test} | ({} if holdout is None else {"holdout": holdout})
    return sets | ({"public": {"x": arrays["x_public"]}} if "x_public" in arrays else {})


def _check_all_train(file: str, client: np.ndarray, owner: np.ndarray) -> None:
    """Refuses a test set that took all examples of a client: of the owners of all examples [N] one has no more any."""
    lost = np.setdiff1d(client, owner)
    if lost.size:
        refuse(
            file,
            f"leaves client {lost[0]} nothing to train on, as its examples were drawn for the test set; lower "
            "config.task.test_fraction or config.task.holdout, or add x_test and y_test",
        )


def _standardise(sets: dict[str, np.ndarray], by: str = "train", centred: bool = False) -> dict[str, np.ndarray]:
    """Columns of each set [N, d] to mean 0 and variance 1 by the moments of one; constant ones stay, or become 0."""
    train = sets[by]
    varies = np.any(train != train[:1], axis=0)
    # Columns near one, by powers of two, which rounds nothing: the squares of 1e-170 or 1e200 are no numbers.
    exponent = np.where(varies, np.frexp(np.max(np.abs(train), axis=0, initial=0))[1], 0)
    near_one = np.ldexp(train, -exponent)
    constant = train[0] if centred else 0
    mean, scale = np.where(varies, near_one.mean(0), constant), np.where(varies, near_one.std(0), 1)
    return {name: (np.ldexp(array, -exponent) - mean) / scale for name, array in sets.items()}
