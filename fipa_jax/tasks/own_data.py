"""Regression on a user's own arrays, split over clients by a column, by clusters, or as the user says."""

from collections.abc import Callable

import numpy as np
from absl import logging
from scipy.cluster.vq import ClusterError, kmeans2

from fipa_jax.data.own_arrays import read, refuse
from fipa_jax.data.partition import Ragged, by_owner
from fipa_jax.lookup import lookup
from fipa_jax.models import networks
from fipa_jax.tasks.regression import pack, regression
from fipa_jax.tasks.task import Problem

KMEANS_STEPS = 30
FEW = 5  # examples of a client, below which a person is told
Examples = tuple[np.ndarray, np.ndarray]  # (x [N, d], y [N, K])
# (task, x [N, d], client [N] or None) -> [N] owners, the clients in the order of their values
OwnerOf = Callable[..., np.ndarray]


def build(config) -> Problem:
    """Builds the task `npz`: half-squared error on the arrays of `config.task.file`.

    Its arrays, as `own_arrays.read` takes them, are x [N, d] and y [N] or [N, K]; optionally x_test and y_test, else
    `config.task.test_fraction` of the examples is set apart; optionally client [N], the integer id of each example's
    owner, for the split `given`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no .npz of plain arrays that fit together, or the split asked for does not exist.
    """
    task, dtype = config.task, np.dtype(config.precision)
    lookup(SPLITS, task.split, "config.task.split")  # a mistake in the name shows before the file is read
    arrays = read(task.file)
    (x, y, client), (x_test, y_test) = _set_apart(arrays, task)
    clients = split(task, x, client)
    if task.standardise:
        (x, x_test), (y, y_test) = _standardise(x, x_test), _standardise(y, y_test)
    module = networks.build(config.model, num_outputs=y.shape[1])
    with np.errstate(over="ignore"):  # which is an error of the file's, below
        train, test = pack(x, y, dtype), pack(x_test, y_test, dtype)
    for name, array in (*train.items(), *test.items()):
        if not np.all(np.isfinite(array)):
            refuse(task.file, f"holds {name} too large for config.precision = {config.precision!r}; scale it down")
    _warn_of_small(clients)
    return Problem(regression(module, train["x"][0]), train, test, None, clients)


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
    (x,), draw = _standardise(x), np.random.default_rng(task.seed)
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
            f"config.task.split: 'given' needs an integer array client [N] in config.task.file, {task.file!r}; "
            f"add it, or use one of {', '.join(sorted(set(SPLITS) - {'given'}))}"
        )
    return client


SPLITS: dict[str, OwnerOf] = {"column": _by_column, "given": _by_client, "kmeans": _by_kmeans}


def _set_apart(arrays: dict, task) -> tuple[tuple, Examples]:
    """((x, y, client) to train on, (x, y) to test on): the file's own test set, or a random part of its examples."""
    x, y, client = arrays["x"], arrays["y"], arrays.get("client")
    if "x_test" in arrays:
        return (x, y, client), (arrays["x_test"], arrays["y_test"])
    order = np.random.default_rng(task.seed).permutation(len(x))
    count = max(1, round(task.test_fraction * len(x)))
    test, train = np.sort(order[:count]), np.sort(order[count:])
    owner = None if client is None else client[train]
    if task.split == "given" and client is not None:
        _check_all_train(task.file, client, client[train])
    return (x[train], y[train], owner), (x[test], y[test])


def _check_all_train(file: str, client: np.ndarray, owner: np.ndarray) -> None:
    """Refuses a test set that took all examples of a client: of the owners of all examples [N] one has no more any."""
    lost = np.setdiff1d(client, owner)
    if lost.size:
        refuse(
            file,
            f"leaves client {lost[0]} nothing to train on, as its examples were drawn for the test set; lower "
            "config.task.test_fraction, or add x_test and y_test",
        )


def _standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Columns to mean 0 and variance 1 by the moments of the first array [N, d]; its constant columns stay."""
    varies = np.any(train != train[:1], axis=0)
    # Columns near one, by powers of two, which rounds nothing: the squares of 1e-170 or 1e200 are no numbers.
    exponent = np.where(varies, np.frexp(np.max(np.abs(train), axis=0, initial=0))[1], 0)
    near_one = np.ldexp(train, -exponent)
    mean, scale = np.where(varies, near_one.mean(0), 0), np.where(varies, near_one.std(0), 1)
    return [(np.ldexp(array, -exponent) - mean) / scale for array in (train, *others)]
