"""Regression on a user's own arrays, read from an .npz file and split over clients."""

import difflib
import os
from pathlib import Path

import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2

from fipa_jax.data import partition
from fipa_jax.models import networks as models
from fipa_jax.tasks.regression import regression
from fipa_jax.tasks.task import Problem

NAMES = ("x", "y", "x_test", "y_test", "client")  # of the arrays that the task knows
RECIPE = 'np.savez("mine.npz", x=x, y=y)'
KMEANS_STEPS = 30


def build(config) -> Problem:
    """Builds the task `npz`: half-squared error on the arrays of `config.task.file`.

    Its arrays are x [N, d] and y [N] or [N, K]; optionally x_test and y_test, else `config.task.test_fraction` of the
    examples is set apart; optionally client [N], the integer id of each example's owner, for the split `given`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no .npz of plain arrays that fit together, or the split asked for does not exist.
    """
    task, dtype = config.task, np.dtype(config.precision)
    if task.split not in SPLITS:
        raise ValueError(f"config.task.split: unknown split {task.split!r}; known: {', '.join(sorted(SPLITS))}")
    arrays = read(task.file)
    (x, y, client), (x_test, y_test) = _set_apart(arrays, task)
    clients = split(task, x, client)
    if task.standardise:
        (x, x_test), (y, y_test) = _standardise(x, x_test), _standardise(y, y_test)
    pack = lambda x, y: {"x": x.astype(dtype), "y": y.astype(dtype)}
    module = models.build(config.model, num_outputs=y.shape[1])
    return Problem(regression(module, x[0].astype(dtype)), pack(x, y), pack(x_test, y_test), None, clients)


def read(file: str) -> dict:
    """{name: array} of those arrays of an .npz that the task knows, checked: x, y, x_test, y_test, client.

    Returns:
      x [N, d] and y [N, K] in float64, and where they are there x_test, y_test alike and client [N].

    Raises:
      FileNotFoundError, ValueError: see `build`.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"config.task.file: no file at {file!r}; give the path of an .npz with arrays x and y")
    with open(file, "rb") as stream:
        arrays = _load(file, stream)
    for name in ("x", "y"):
        if name not in arrays:
            _refuse(file, f"has no array {name!r}; write one with {RECIPE}")
    if ("x_test" in arrays) != ("y_test" in arrays):
        _refuse(file, "has one of x_test and y_test; add the other one, or leave both out")
    for inputs, targets in (("x", "y"), ("x_test", "y_test")):
        if inputs in arrays:
            arrays[inputs], arrays[targets] = _pair(file, inputs, targets, arrays[inputs], arrays[targets])
    for name in ("x", "y"):
        wide, test = arrays[name].shape[1], arrays.get(f"{name}_test")
        if test is not None and test.shape[1] != wide:
            _refuse(file, f"has {wide} columns in {name} but {test.shape[1]} in {name}_test; make them equal")
    if "client" in arrays:
        _check_client(file, arrays["client"], len(arrays["x"]))
    return arrays


def split(task, x: np.ndarray, client: np.ndarray | None) -> partition.Ragged:
    """For each client the indices of its examples, by the rule `task.split`, a key of `SPLITS`.

    Args:
      task: with the fields num_clients, split, column, seed and file.
      x: [N, d], of the training set.
      client: [N] owners' ids of the training set, or None.

    Raises:
      ValueError: the rule's column or array is not there, or a client would own nothing.
    """
    if task.split != "given" and len(x) < task.num_clients:
        raise ValueError(
            f"config.task.num_clients: {task.num_clients} clients need an example each, but config.task.file has "
            f"{len(x)} to train on; lower it"
        )
    owner = SPLITS[task.split](task, x, client)
    return partition.by_owner(owner)


def _by_column(task, x, client):
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


def _by_kmeans(task, x, client):
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


def _by_client(task, x, client):
    if client is None:
        raise ValueError(
            f"config.task.split: 'given' needs an integer array client [N] in config.task.file, {task.file!r}; "
            f"add it, or use one of {', '.join(sorted(set(SPLITS) - {'given'}))}"
        )
    return client


# (task, x [N, d], client [N] or None) -> [N] owners
SPLITS = {"column": _by_column, "given": _by_client, "kmeans": _by_kmeans}


def _set_apart(arrays, task):
    """((x, y, client) to train on, (x, y) to test on): the file's own test set, or a random part of its examples."""
    x, y, client = arrays["x"], arrays["y"], arrays.get("client")
    if "x_test" in arrays:
        return (x, y, client), (arrays["x_test"], arrays["y_test"])
    order = np.random.default_rng(task.seed).permutation(len(x))
    count = max(1, round(task.test_fraction * len(x)))
    test, train = np.sort(order[:count]), np.sort(order[count:])
    mine = None if client is None else client[train]
    if task.split == "given" and mine is not None:
        lost = np.setdiff1d(client, mine)
        if lost.size:
            _refuse(
                task.file,
                f"leaves client {lost[0]} nothing to train on, as its examples were drawn for the test set; lower "
                "config.task.test_fraction, or add x_test and y_test",
            )
    return (x[train], y[train], mine), (x[test], y[test])


def _standardise(train, *others):
    """Columns to mean 0 and variance 1 by the moments of the first array [N, d]; its constant columns stay."""
    varies = np.ptp(train, axis=0) > 0
    mean, scale = np.where(varies, train.mean(0), 0), np.where(varies, train.std(0), 1)
    return [(array - mean) / scale for array in (train, *others)]


def _load(file, stream):
    """{name: array} of those arrays that the task knows, all of real numbers."""
    try:
        archive = np.load(stream, allow_pickle=False)
    except partition.BROKEN as error:
        _refuse(file, f"is no .npz archive{partition.why(error)}, and nothing is unpickled; write one with {RECIPE}")
    if not isinstance(archive, np.lib.npyio.NpzFile):
        _refuse(file, f"holds one bare array and is no .npz archive; write one with {RECIPE}")
    stream.seek(-12 - len(archive.zip.comment), os.SEEK_END)  # a number that zipfile does not look at
    if (there := int.from_bytes(stream.read(2), "little")) != len(archive.files):
        _refuse(file, f"is damaged: it should hold {there} arrays, but lists {archive.files}; write it anew")
    for name in sorted({*archive.files} - {*NAMES}):  # one flipped bit makes another name, too
        if near := difflib.get_close_matches(name, [*NAMES, *(f"{known}.npy" for known in NAMES)], 1, cutoff=0.8):
            _refuse(file, f"has an array {name!r}; did you mean {near[0].removesuffix('.npy')!r}?")
    arrays = {}
    for name in [name for name in NAMES if name in archive.files]:
        try:
            arrays[name] = archive[name]
        except partition.BROKEN as error:
            _refuse(
                file,
                f"has a {name!r} that cannot be read{partition.why(error)}; nothing is unpickled: save plain numbers",
            )
        if arrays[name].dtype.kind not in "biuf":
            _refuse(file, f"has {name!r} of dtype {arrays[name].dtype}; save real numbers")
    return arrays


def _pair(file, inputs, targets, x, y):
    """Inputs [N, d] and targets [N, K] in float64, checked; targets [N] become [N, 1]."""
    if x.ndim != 2:
        _refuse(file, f"has {inputs} of shape {list(x.shape)}; make it [N, d], a single column by x.reshape(-1, 1)")
    if y.ndim not in (1, 2):
        _refuse(file, f"has {targets} of shape {list(y.shape)}; make it [N] or [N, K]")
    if len(x) != len(y):
        _refuse(file, f"has {len(x)} rows in {inputs} but {len(y)} in {targets}; make them equal")
    if not x.size or not y.size:
        _refuse(file, f"has {inputs} of shape {list(x.shape)} and {targets} of {list(y.shape)}: nothing is in there")
    x, y = x.astype(np.float64), y.reshape(len(y), -1).astype(np.float64)
    for name, array in ((inputs, x), (targets, y)):
        wrong = np.flatnonzero(~np.all(np.isfinite(array), axis=1))
        if wrong.size:
            _refuse(file, f"has NaN or infinity in {wrong.size} rows of {name}, first in row {wrong[0]}; drop them")
    return x, y


def _check_client(file, client, num_examples):
    if client.dtype.kind not in "iu" or client.shape != (num_examples,):
        _refuse(
            file,
            f"has client of dtype {client.dtype} and shape {list(client.shape)}; make it integers [{num_examples}]",
        )


def _refuse(file, what):
    raise ValueError(f"config.task.file: {file!r} {what}") from None
