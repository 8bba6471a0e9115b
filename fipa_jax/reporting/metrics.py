"""How good a model is, overall and for each client, and the file that keeps it, one row a round."""

import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fipa_jax.tasks.task import Figures, Task, means

# (params, {field: [N, ...]}) -> arrays with the examples' axis, [N, ...].
OfExamples = Callable[[Any, dict], Any]
HIGHER = {"accuracy", "auc", "dice", "f1", "iou", "precision", "r2", "recall"}  # words of figures: higher is better
FEW = 10  # clients, up to which each one's figures on its own test set are reported


def make_evaluate(task: Task, batch_size: int, mesh: Mesh | None = None) -> OfExamples:
    """Builds `evaluate(params, data) -> {name: [N]}`: the task's metrics of every example, in batches; jit it."""

    def metrics(params, batch):
        return task.metrics(task.outputs(params, batch)[0], batch)

    return over_examples(metrics, batch_size, mesh)


def over_examples(function: OfExamples, batch_size: int, mesh: Mesh | None = None) -> OfExamples:
    """Builds `run(params, data)`: function(params, batch), whose arrays have an example axis, of all, in batches.

    Args:
      mesh: devices with an axis `clients`, over which whole batches are spread; the batches are the same without.
    """

    def in_turns(size: int, params, data: dict):

        def one(example):
            batch = jax.tree.map(lambda field: field[None], example)
            return jax.tree.map(lambda value: value[0], function(params, batch))

        # lax.map runs the remainder as a batch of its own: no example is padded or counted twice.
        return jax.lax.map(one, data, batch_size=size)

    def run(params, data: dict):
        num_examples = jax.tree.leaves(data)[0].shape[0]
        size = min(batch_size, num_examples)
        devices = 1 if mesh is None else mesh.shape["clients"]
        together = num_examples // size // devices * devices * size  # the examples of batches that can be dealt evenly
        if devices == 1 or not together:
            return in_turns(size, params, data)
        one, share = PartitionSpec(), PartitionSpec("clients")
        own = functools.partial(in_turns, size)
        spread = jax.shard_map(own, mesh=mesh, in_specs=(one, share), out_specs=share, check_vma=False)
        first = spread(params, jax.tree.map(lambda field: field[:together], data))
        first = jax.lax.with_sharding_constraint(first, NamedSharding(mesh, one))
        if together == num_examples:
            return first
        rest = in_turns(size, params, jax.tree.map(lambda field: field[together:], data))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, rest)

    return run


def overall(values: dict, prefix: str, figures: Figures = means) -> dict:
    """{prefix_name: []}, what is reported of a set of examples.

    Args:
      values: {name: [N, ...]}, the metrics of the examples.
      prefix: of the names.
      figures: `Task.figures`.
    """
    return {f"{prefix}_{name}": value for name, value in figures(values).items()}


def of_clients(values: dict, figures: Figures) -> dict:
    """Those of the metrics {name: [N]} whose means over a client's examples say something: what `figures` has too."""
    reported = jax.eval_shape(figures, values)
    return {name: value for name, value in values.items() if name in reported}


def over_clients(means: dict, num_examples: jax.Array, prefix: str = "client") -> dict:
    """Mean, standard deviation and worst decile over clients of their own means.

    The worst decile is the mean over the tenth of the clients (at least one) with the lowest accuracy, or the highest
    value of any other figure (NaN is worst).

    Args:
      means: {name: [T]}, the mean over each client's examples.
      num_examples: [T]; clients without examples do not count.
      prefix: of the names.
    """
    present = num_examples > 0  # [T]
    number = jnp.maximum(jnp.sum(present), 1)
    result = {}
    for name, values in means.items():
        mean = jnp.sum(jnp.where(present, values, 0)) / number
        spread = jnp.sqrt(jnp.sum(jnp.where(present, (values - mean) ** 2, 0)) / number)
        badness = jnp.where(present, jnp.nan_to_num(-direction(f"{prefix}_{name}") * values, nan=jnp.inf), -jnp.inf)
        worst = values[jnp.argsort(-badness)]
        decile = jnp.arange(worst.size) < jnp.maximum(number // 10, 1)
        result[f"{prefix}_{name}_mean"] = mean
        result[f"{prefix}_{name}_std"] = spread
        result[f"{prefix}_{name}_worst_decile"] = jnp.sum(jnp.where(decile, worst, 0)) / jnp.sum(decile)
    return result


def of_each_client(values: dict, owned: dict, figures: Figures) -> dict:
    """{client_test_NAME/CLIENT: []}, what is reported of each client's own test examples; nothing of many clients.

    Args:
      values: {name: [N, ...]}, the metrics of all test examples.
      owned: {name of a client: [N_m], the places of its examples}.
      figures: `Task.figures`.
    """
    if len(owned) > FEW:
        return {}
    found = {client: figures(jax.tree.map(lambda v, own=own: v[own], values)) for client, own in owned.items()}
    return {f"client_test_{name}/{client}": value for client, of in found.items() for name, value in of.items()}


class Writer:
    """Appends rows to a JSON-lines file, each in the file when `write` returns.

    Args:
      path: of the file.
      size: bytes of it that are kept; what comes after them goes.
    """

    def __init__(self, path: Path, size: int = 0):
        self._file = path.open("ab")
        self._file.truncate(size)

    def write(self, row: dict) -> None:
        """Writes one row; values are numbers, strings or lists; a NaN is written as null."""
        self._file.write(json.dumps(jsonable(row), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """The file's size in bytes, all of which are on the disk when `sync` returns."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read(path: Path, size: int | None = None) -> list[dict]:
    """All rows of a metrics file, or those in its first `size` bytes.

    Raises:
      ValueError: names the file and the first line that is no row.
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes()[:size].splitlines(), 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"run", "round"} <= row.keys():
                raise ValueError("it needs a run and a round")
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is no row of metrics: {error}") from None
        rows.append(row)
    return rows


def jsonable(value):
    """Arrays to numbers and lists, and what JSON has no word for (NaN, infinity) to null."""
    if isinstance(value, dict):
        return {name: jsonable(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(inner) for inner in value]
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


COSTS = {  # what a round costs, by its row
    "seconds": lambda row: sum(value for name, value in row.items() if name.startswith("seconds_")),  # compilation too
    "rounds": lambda row: 1,
    "megabytes": lambda row: (row.get("bytes_up", 0) + row.get("bytes_down", 0)) / 1e6,  # of all clients together
}


def within(rows: list[dict], most: float, cost: str = "seconds") -> list[dict]:
    """The rows of each run up to the round with which its rounds have cost so much.

    Args:
      rows: of several runs.
      most: of the cost.
      cost: a key of `COSTS`.
    """
    spent, kept = Counter(), []
    for row in rows:
        spent[row["run"]] += COSTS[cost](row)
        if spent[row["run"]] <= most:
            kept.append(row)
    return kept


def personal(final: dict) -> list[tuple[str, str, int, list]]:
    """(metric, way, own examples or 0 for all, [mean, worst decile, spread]) of the clients' own models, by metrics.

    Args:
      final: a run's last figures, among them those of `run.personal_stage`.
    """
    lines = []
    for name, mean in final.items():
        if match := re.fullmatch(r"personal_([a-z]+?)_(?:(\d+)_)?(.+)_mean", name):
            way, number, metric = match.groups()
            others = [final.get(f"{name.removesuffix('_mean')}_{of}") for of in ("worst_decile", "std")]
            lines.append((metric, way, int(number or 0), [mean, *others]))
    return sorted(lines, key=lambda line: (line[0], line[2]))


def each_client(final: dict) -> dict[str, dict[str, float]]:
    """{client: {figure: value}} of the clients' own test sets, where each one's figures are reported.

    Args:
      final: a run's last figures.
    """
    found: dict[str, dict] = {}
    for name, value in final.items():
        figure, has_client, client = name.partition("/")
        if has_client:
            found.setdefault(client, {})[figure.removeprefix("client_test_")] = value
    return found


def series(rows: list[dict]) -> dict:
    """{(run, figure): its values, evaluation by evaluation}; None where an evaluation gave no number."""
    values = {}
    for row in rows:
        for name, value in row.items():
            if direction(name):
                values.setdefault((row["run"], name), []).append(value)
    return values


def summarise(rows: list[dict]) -> dict:
    """{"final": last value of each evaluated figure, "best": its best}, of the rows of one run.

    The final value is None where the last evaluation gave no number, the best where none did: a run that diverged does
    not show the last figure from before.
    """
    final, best = {}, {}
    for (_, name), values in series(rows).items():
        numbers = [value for value in values if value is not None]
        final[name], best[name] = values[-1], (max if direction(name) > 0 else min)(numbers, default=None)
    return {"final": final, "best": best}


def direction(name: str) -> int:
    """+1 for accuracies and the like (`HIGHER`), -1 for other figures of evaluation, 0 for what is not one.

    The spread over clients counts where they have models of their own: there it is the aim that nobody is left behind.
    """
    name = name.partition("/")[0]  # without the client's name
    if not name.startswith(("test_", "holdout_", "client_", "personal_")):
        return 0
    if name.endswith("_std"):
        return -1 if name.startswith("personal_") else 0
    return 1 if "accuracy" in name or HIGHER & {*name.lower().split("_")} else -1
