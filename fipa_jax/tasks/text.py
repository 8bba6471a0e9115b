"""The next character of texts that have owners, such as the speakers of plays: windows of a text, split in time."""

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fipa_jax.data.own_arrays import refuse
from fipa_jax.data.partition import BROKEN, why
from fipa_jax.files import local
from fipa_jax.models import networks
from fipa_jax.tasks.task import Problem, Task

ABSENT = -1  # in y, behind the end of a text
ARRAYS = ("text", "length", "client")
RECIPE = "as scripts/prepare_data.py shakespeare does"


class Texts(NamedTuple):
    """Who has written what."""

    names: list[str]  # of the T clients
    symbols: list[np.ndarray]  # of each [L] int32, the places of its characters in the alphabet
    alphabet: list[str]  # the K characters of all texts, in the file


def build(config) -> Problem:
    """Builds the task `text` from the file `config.task.file`, see `read`.

    Clients are those with `config.task.least_characters`. The end of every client's text is its test set,
    `config.task.test_fraction` of it, and the end of what is before it is held out, `config.task.holdout`. Each part is
    cut into windows: an example has x [T] and y [T], y_t the character after x_t, and T = `config.task.window`; the
    last window of a part may be shorter, and y is then `ABSENT` behind its end.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file does not hold what it should, or no text is long enough.
    """
    task = config.task
    networks.build(config.model, num_outputs=1)  # what is wrong with the config shows before the file is read
    texts = read(task.file, task.least_characters)
    parts = [_in_time(symbols, task) for symbols in texts.symbols]
    train, owners = _windows([part[0] for part in parts], task.window)
    test, test_owners = _windows([part[2] for part in parts], task.window)
    holdout = _windows([part[1] for part in parts], task.window)[0] if task.holdout else None
    everyone = range(len(texts.names))
    module = networks.build(config.model, num_outputs=len(texts.alphabet))
    return Problem(
        task=next_symbol(module, task.window),
        train=train,
        test=test,
        holdout=holdout,
        clients=[np.flatnonzero(owners == client) for client in everyone],
        test_clients=[np.flatnonzero(test_owners == client) for client in everyone],
        names=texts.names,
        baseline=("the characters' shares, whatever is before", _by_shares(train["y"], test["y"], len(texts.alphabet))),
    )


def next_symbol(module, window: int) -> Task:
    """A task from a flax module that maps symbols [B, T] to the logits of the next ones, [B, T, K].

    The loss of an example is the mean over its positions, so that H = 1/N sum_n 1/T_n sum_t J_nt^T L_nt J_nt.
    """

    def init(key):
        return module.init(key, jnp.zeros([1, window], jnp.int32))["params"]

    def outputs(params, batch):
        return module.apply({"params": params}, batch["x"])

    def head(params, body):
        return networks.apply_head(module.head_layers, params, body)

    return Task(init, outputs, loss, metrics, head=head, head_pattern=f"^({'|'.join(module.head_layers)})/")


def loss(outputs: jax.Array, batch: dict) -> jax.Array:
    """[B], the cross-entropy in nats of logits [B, T, K], the mean over the positions of y [B, T] that are there."""
    there = batch["y"] != ABSENT
    each = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(there, batch["y"], 0))
    return _mean_over_positions(each, there)


def metrics(outputs: jax.Array, batch: dict) -> dict[str, jax.Array]:
    """{name: [B]} of each window: the share of its characters that are predicted rightly, and its loss."""
    right = jnp.argmax(outputs, axis=-1) == batch["y"]
    accuracy = _mean_over_positions(right.astype(outputs.dtype), batch["y"] != ABSENT)
    return {"accuracy": accuracy, "loss": loss(outputs, batch)}


def _mean_over_positions(values: jax.Array, there: jax.Array) -> jax.Array:
    """[B], of values [B, T] where `there` [B, T] holds."""
    return jnp.sum(jnp.where(there, values, 0), axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)


def read(file: str, least: int) -> Texts:
    """The texts of the clients that have so many characters, from an .npz that nobody has to trust.

    Args:
      file: its path, `config.task.file`: text [L], the code points of all characters, one client's after another's;
        length [S], the characters of each client; client [S], their names.
      least: `config.task.least_characters`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such .npz, or no text is long enough.
    """
    path = local(file, "config.task.file")
    if not path.is_file():
        raise FileNotFoundError(
            f"config.task.file: no file at {file!r}; write it by python scripts/prepare_data.py shakespeare"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS}
    except (*BROKEN, KeyError, TypeError) as error:
        refuse(file, f"is no .npz with {', '.join(ARRAYS)}{why(error)}; write it {RECIPE}")
    text, length, client = (arrays[name] for name in ARRAYS)
    if text.dtype.kind != "u" or length.dtype.kind not in "iu" or {a.ndim for a in arrays.values()} != {1}:
        refuse(
            file,
            f"has {', '.join(f'{name} {a.dtype}{list(a.shape)}' for name, a in arrays.items())}; write it {RECIPE}",
        )
    if length.sum() != len(text) or len(length) != len(client) or np.any(length < 0):
        refuse(file, f"has {len(text)} characters in text, {length.sum()} by the lengths of {len(client)} clients")
    if text.max(initial=0) > sys.maxunicode:
        refuse(file, f"has a character {text.max()} in text, which is no code point; write it {RECIPE}")
    names, owned = np.unique(client, return_counts=True)
    if np.any(owned > 1):
        refuse(file, f"names client {str(names[owned > 1][0])!r} {owned.max()} times; join the texts of each")
    letters, symbols = np.unique(text, return_inverse=True)
    long = np.flatnonzero(length >= least)
    if not len(long):
        raise ValueError(
            f"config.task.least_characters: none of {len(client)} clients has {least} characters, the longest text has "
            f"{length.max(initial=0)}; lower it"
        )
    cut = np.split(symbols.astype(np.int32), np.cumsum(length)[:-1])
    return Texts([str(client[i]) for i in long], [cut[i] for i in long], [chr(letter) for letter in letters])


def _in_time(symbols: np.ndarray, task) -> list[np.ndarray]:
    """[train, holdout, test] of a text [L], its beginning, what comes then, and its end."""
    end = len(symbols) - round(task.test_fraction * len(symbols))
    middle = end - round(task.holdout * end)
    parts = np.split(symbols, [middle, end])
    wanted = (True, task.holdout > 0, True)
    if any(len(part) < 2 for part, is_wanted in zip(parts, wanted, strict=True) if is_wanted):
        raise ValueError(
            f"config.task.least_characters: a text of {len(symbols)} characters is too short to be cut into training, "
            f"holdout and test parts by config.task.test_fraction = {task.test_fraction} and config.task.holdout = "
            f"{task.holdout}; raise it"
        )
    return parts


def _windows(parts: list[np.ndarray], window: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({"x", "y": [N, T]}, owners [N]) of the clients' texts, each cut into windows that do not overlap."""
    x, y, owners = [], [], []
    for owner, part in enumerate(parts):
        number = -(-(len(part) - 1) // window)
        padding = (0, number * window + 1 - len(part))
        x.append(np.pad(part[:-1], padding).reshape(number, window))
        y.append(np.pad(part[1:], padding, constant_values=ABSENT).reshape(number, window))
        owners.append(np.full(number, owner))
    return {"x": np.concatenate(x), "y": np.concatenate(y)}, np.concatenate(owners)


def _by_shares(train: np.ndarray, test: np.ndarray, num_symbols: int) -> dict[str, float]:
    """{figure: what who always answers by the characters' shares in y [N, T] has on the test}.

    Each is counted once more than it is there, as one may be in the test alone.
    """
    share = np.bincount(train[train != ABSENT], minlength=num_symbols) + 1.0
    there, cost = test != ABSENT, -np.log(share / share.sum())[np.maximum(test, 0)]
    of_each = {"accuracy": test == share.argmax(), "loss": cost}
    return {name: float(np.mean((values * there).sum(1) / there.sum(1))) for name, values in of_each.items()}
