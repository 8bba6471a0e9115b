"""Who owns which example: splits of a labelled data set over clients, drawn or read from a file; NumPy only.

Two Dirichlet splits are in use and are not the same: `dirichlet` gives every client equally many examples and skews
its classes, `dirichlet_by_class` spreads every class over the clients and leaves their sizes ragged. A new split is an
entry of `PARTITIONS`; a user's own arrays are split by `tasks.own_data.SPLITS`.
"""

import ast
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fipa_jax.files import local, read_text
from fipa_jax.lookup import lookup

# What reading a damaged archive raises; NotImplementedError, a RuntimeError, where a bit makes it another kind.
BROKEN = (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def partition(
    name: str,
    labels: np.ndarray,
    num_clients: int,
    seed: int,
    *,
    alpha: float | None = None,
    shards_per_client: int | None = None,
    file: str | None = None,
) -> list[np.ndarray]:
    """Splits the examples over clients by the split `name`, a key of `PARTITIONS`.

    Args:
      name: of the split.
      labels: [N] integer classes.
      num_clients: T.
      seed: seed of the split; the same seed gives the same split.
      alpha: Dirichlet concentration, positive; the smaller, the fewer classes a client sees.
      shards_per_client: shards a client is dealt, for `shards`.
      file: path of a published split, for `file`.

    Returns:
      For each of the T clients the sorted indices of its examples: disjoint, none empty.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the name is not known, or the split asked for does not exist.
    """
    fields = check(name, alpha=alpha, shards_per_client=shards_per_client, file=file)
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"a split needs integer labels [N], got {labels.dtype} {list(labels.shape)}")
    if not 1 <= num_clients <= len(labels):
        raise ValueError(
            f"config.partition.num_clients: needs 1 to {len(labels)} clients, one example each, got {num_clients}"
        )
    clients = PARTITIONS[name].draw(np.random.default_rng(seed), labels, num_clients, **fields)
    return [np.sort(client) for client in clients]


def check(name: str, **values) -> dict:
    """Of the fields of config.partition those that the split `name` reads, {field: value}; needs no data.

    Raises:
      ValueError: the name is not known, or a field has no value that its split can take.
    """
    fields = lookup(PARTITIONS, name, "config.partition.name").fields
    for field in fields:
        value, wanted = values[field], "the path of a split" if field == "file" else "a positive number"
        if not value or not (field == "file" or value > 0):
            raise ValueError(f"config.partition.{field}: split {name!r} needs {wanted}, got {value!r}")
    return {field: values[field] for field in fields}


def dirichlet(rng: np.random.Generator, labels: np.ndarray, num_clients: int, alpha: float) -> list[np.ndarray]:
    """Equal sizes: client after client draws p ~ Dir(alpha 1_K), then N // T of the examples left, their classes ~ p.

    When a class is exhausted, p is renormalised over the classes still open; where a small alpha left no mass on any of
    them, p is drawn anew over them. The N % T examples left at the end belong to nobody.
    """
    _, classes = np.unique(labels, return_inverse=True)
    left = [rng.permutation(np.flatnonzero(classes == k)) for k in range(classes.max() + 1)]
    clients = []
    for _ in range(num_clients):
        mine, wanted = [], len(labels) // num_clients
        proportions = rng.dirichlet(np.full(len(left), alpha))  # [K]
        while wanted:
            is_open = np.array([len(indices) > 0 for indices in left])  # [K]
            proportions = np.where(is_open, proportions, 0.0)
            if not proportions.any():
                proportions[is_open] = rng.dirichlet(np.full(is_open.sum(), alpha))
            proportions = proportions / proportions.sum()
            for k, count in enumerate(rng.multinomial(wanted, proportions)):
                taken, left[k] = np.split(left[k], [count])  # a class with fewer examples gives what it has
                mine.append(taken)
                wanted -= len(taken)
        clients.append(np.concatenate(mine))
    return clients


def dirichlet_by_class(
    rng: np.random.Generator,
    labels: np.ndarray,
    num_clients: int,
    alpha: float,
    min_examples: int = 1,
    tries: int = 1000,
) -> list[np.ndarray]:
    """Ragged sizes: class after class is spread over the clients by p ~ Dir(alpha 1_T).

    Drawn again, up to `tries` times, until every client has `min_examples` examples.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    for _ in range(tries):
        proportions = rng.dirichlet(np.full(num_clients, alpha), size=len(sizes))  # [K, T]
        # The last edge is the class's size itself, whatever the rounding of the sum.
        edges = np.round(np.cumsum(proportions, axis=1)[:, :-1] * sizes[:, None]).astype(int)  # [K, T - 1]
        counts = np.diff(edges, axis=1, prepend=0, append=sizes[:, None]).sum(axis=0)
        if counts.min() >= min_examples:
            break
    else:
        raise ValueError(
            f"in {tries} draws of a Dirichlet split by class, {num_clients} clients never had {min_examples} or more "
            f"of the {len(labels)} examples each: raise config.partition.alpha ({alpha}), lower "
            f"config.partition.num_clients, or take the balanced split 'dirichlet'"
        )
    parts = [np.split(rng.permutation(np.flatnonzero(classes == k)), edges[k]) for k in range(len(sizes))]
    return [np.concatenate(client) for client in zip(*parts, strict=True)]


def shards(rng: np.random.Generator, labels: np.ndarray, num_clients: int, shards_per_client: int) -> list[np.ndarray]:
    """Sorts the examples by class, cuts them into T s nearly equal shards and deals s of them to each client."""
    num_shards = num_clients * shards_per_client
    if num_shards > len(labels):
        raise ValueError(
            f"config.partition.shards_per_client: {num_clients} clients x {shards_per_client} shards need at least as "
            f"many examples, got {len(labels)}"
        )
    shuffled = rng.permutation(len(labels))
    by_class = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_shards)
    hands = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.concatenate([by_class[shard] for shard in hand]) for hand in hands]


def iid(rng: np.random.Generator, labels: np.ndarray, num_clients: int) -> list[np.ndarray]:
    """Deals the shuffled examples out, to sizes that differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


def from_file(rng: np.random.Generator, labels: np.ndarray, num_clients: int, file: str) -> list[np.ndarray]:
    """Reads a published split: for each client the indices of its examples, in the data set's original order.

    The records of the prepared data must be in that order too, as `sources.prepare` writes them; TFDS's own
    builders shuffle. Three forms are known, none of which is executed or unpickled: JSON, an object client -> list or a
    list of lists; the same as a Python literal, `{0: [...], ...}`, in which FedRCL and FedACG publish theirs; `.npz`
    with an array a client, named by its number, or `arr_` and its number. Examples may be left to nobody.

    For Tiny-ImageNet, FedACG's code counts in the order in which its authors' machine listed the folders of the
    classes: read here, clients have as many examples of as many classes as published, but of other classes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not of these forms, or what it holds is not a split of `labels` over `num_clients`.
    """
    lists = _read_lists(file)
    if sorted(lists) != list(range(num_clients)):
        raise ValueError(
            f"config.partition.num_clients: {num_clients} needs the clients 0 to {num_clients - 1} in {file}, which "
            f"has {len(lists)}: {_few(sorted(lists))}"
        )
    clients = [_indices(lists[client], client, len(labels), file) for client in range(num_clients)]
    indices, counts = np.unique(np.concatenate(clients), return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"config.partition.file: {file} gives away more than once the examples {_few(indices[counts > 1].tolist())}"
        )
    return clients


def _read_lists(file: str) -> dict:
    """{client: its list of indices, or array} of a published split, not checked yet."""
    try:
        path = local(file, "config.partition.file")
        if path.suffix == ".npz":
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                return {int(name.removeprefix("arr_")): arrays[name] for name in arrays.files}
        return _literal(read_text(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.partition.file: no split at {file}") from error
    except (TypeError, SyntaxError, *BROKEN) as error:
        raise ValueError(
            f"config.partition.file: {file} is no list of indices for each client, in JSON, as a Python literal or in "
            f".npz{why(error)}"
        ) from error


def why(error: Exception) -> str:
    """An error's text in brackets, unless it is NumPy's advice to unpickle what is not to be trusted."""
    return "" if "pickle" in str(error) else f" ({error})"


def _literal(text: str) -> dict:
    """{client: list} from the literal of a dictionary, or of a list of lists; no client may be there twice."""
    tree = ast.parse(text.strip(), mode="eval")
    value = ast.literal_eval(tree)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if not isinstance(value, dict) or not all(isinstance(client, int | str) for client in value):
        raise ValueError("it should map each client's number to its list")
    by_number = {int(client): indices for client, indices in value.items()}
    if len(by_number) < len(tree.body.keys):
        raise ValueError("a client is there twice")
    return by_number


def _indices(listed, client: int, num_examples: int, file: str) -> np.ndarray:
    """One client's list as an array [N_m], once it is checked."""
    where = f"config.partition.file: client {client} of {file}"
    listed = listed.tolist() if isinstance(listed, np.ndarray) else listed
    if not isinstance(listed, list | tuple | set) or not listed:
        raise ValueError(f"{where} has no list of examples, or an empty one")
    if not all(type(i) is int for i in listed):
        raise ValueError(f"{where} needs a flat list of integers")
    outside = [i for i in listed if not 0 <= i < num_examples]
    if outside:
        raise ValueError(
            f"{where} owns the examples {_few(outside)}, but the training set has 0 to {num_examples - 1}: is this "
            f"the split of another data set?"
        )
    return np.array(list(listed), np.int64)


def _few(values: list) -> str:
    """The first of some values, for an error."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


class Split(NamedTuple):
    """A way to split examples over clients."""

    # (generator, labels [N], number of clients, **fields) -> for each client the indices of its examples
    draw: Callable[..., list[np.ndarray]]
    fields: tuple[str, ...] = ()  # of config.partition that it reads


PARTITIONS = {
    "dirichlet": Split(dirichlet, ("alpha",)),
    "dirichlet_by_class": Split(dirichlet_by_class, ("alpha",)),
    "shards": Split(shards, ("shards_per_client",)),
    "iid": Split(iid),
    "file": Split(from_file, ("file",)),
}


class Ragged(Sequence):
    """Each client's indices, in two arrays whatever the number of clients: a million of them are no million objects.

    Args:
      flat: [N] int, the indices of all clients, one client after another.
      offsets: [T + 1] int, where each client's begin, and the end.
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self.flat, self.offsets = flat, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        if not -len(self) <= client < len(self):
            raise IndexError(f"client {client} of {len(self)}")
        client %= len(self)
        return self.flat[self.offsets[client] : self.offsets[client + 1]]


def by_owner(owner: np.ndarray) -> Ragged:
    """For each value in `owner` [N], in ascending order, the indices that have it, ascending too."""
    _, counts = np.unique(owner, return_counts=True)
    return Ragged(np.argsort(owner, kind="stable"), np.concatenate([[0], np.cumsum(counts)]))


def sizes(clients: Sequence[np.ndarray]) -> np.ndarray:
    """[T] int32, the number of examples of every client.

    Raises:
      ValueError: there are no clients, or a client has no examples.
    """
    num_examples = np.fromiter(map(len, clients), np.int32, len(clients))
    if not len(clients) or num_examples.min() == 0:
        empty = np.flatnonzero(num_examples == 0).tolist()
        raise ValueError(
            f"every client needs an example, but of {len(clients)} clients these have none: {empty}; where "
            f"config.partition deals them out, lower its num_clients or choose another name"
        )
    return num_examples


def pad(clients: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Stacks ragged index lists into one rectangle.

    Args:
      clients: for each of the T clients its indices [N_m].

    Returns:
      indices [T, N_max] int32, each row filled up with the client's first index (valid, but no example of its own:
      `num_examples` masks it), and num_examples [T] int32.

    Raises:
      ValueError: see `sizes`.
    """
    num_examples = sizes(clients)
    indices = np.empty([len(clients), num_examples.max()], np.int32)
    for row, client in zip(indices, clients, strict=True):
        row[: len(client)], row[len(client) :] = client, client[0]
    return indices, num_examples


def class_counts(clients: Sequence[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the examples of each class at each client: [T, K]."""
    return np.stack([np.bincount(labels[client], minlength=num_classes) for client in clients])


def heterogeneity(counts: np.ndarray) -> dict[str, float]:
    """Says how unlike the clients are.

    Args:
      counts: [T, K] examples of each class at each client, no row all zero.

    Returns:
      label_entropy: mean over clients of -sum_k p_mk log p_mk, in nats: log K for even clients, 0 for one class each.
      total_variation: mean over clients of (1/2) sum_k |p_mk - p_k|, p being the distribution of all clients' labels.
    """
    local = counts / counts.sum(axis=1, keepdims=True)  # [T, K]
    overall = counts.sum(axis=0) / counts.sum()  # [K]
    entropy = -np.sum(local * np.log(np.where(local > 0, local, 1.0)), axis=1)
    variation = np.abs(local - overall[None]).sum(axis=1) / 2
    return {"label_entropy": float(entropy.mean()), "total_variation": float(variation.mean())}


def set_apart(train: dict, fraction: float, seed: int, field: str = "fraction") -> tuple[dict, dict | None]:
    """Draws a holdout from the training set, before any client owns an example of it.

    Args:
      train: {field: [N, ...]}.
      fraction: the holdout's share of the N examples, in [0, 1).
      seed: seed of the draw.
      field: what the share is called, for an error.

    Returns:
      The examples that stay and those set apart, in their order; all and None if the share is zero.

    Raises:
      ValueError: the share is not in [0, 1), or is none or all of the examples once it is rounded.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"{field}: a holdout needs a share of the training set in [0, 1), got {fraction}")
    if fraction == 0:
        return train, None
    num_examples = len(next(iter(train.values())))
    num_apart = round(fraction * num_examples)
    if not 0 < num_apart < num_examples:
        change = "lower it" if num_apart else "raise it, or set it to 0"
        raise ValueError(f"{field}: {fraction} of {num_examples} training examples are {num_apart} of them; {change}")
    # A stream of its own, [seed, 1]: the split over clients draws from `seed`.
    order = np.random.default_rng([seed, 1]).permutation(num_examples)
    stay, apart = np.sort(order[num_apart:]), np.sort(order[:num_apart])
    return {k: v[stay] for k, v in train.items()}, {k: v[apart] for k, v in train.items()}
