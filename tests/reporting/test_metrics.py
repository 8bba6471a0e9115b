"""Figures against NumPy, the metrics file, the summary, and saved models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from fipa_jax import tasks
from fipa_jax.client.examples import Client
from fipa_jax.federation.parallel import make_mesh
from fipa_jax.federation.population import Resident
from fipa_jax.reporting import metrics
from fipa_jax.saving.model_files import export, load

NUM_EXAMPLES = 37
COUNTS = np.array([3, 1, 0, 8, 5, 2, 4, 6, 1, 2, 3, 7])  # of twelve clients, one of them without examples


@pytest.fixture
def clients():
    """Twelve clients with ragged shares of the examples, padded by a valid index."""
    draw = np.random.default_rng(0)
    owned = [draw.choice(NUM_EXAMPLES, count, replace=False) for count in COUNTS]
    padded = np.stack([np.pad(mine, (0, COUNTS.max() - mine.size), constant_values=5) for mine in owned])
    return owned, Client(jnp.asarray(padded), jnp.asarray(COUNTS))


@pytest.fixture
def values():
    draw = np.random.default_rng(1)
    return {"accuracy": draw.integers(0, 2, NUM_EXAMPLES).astype(np.float32), "loss": draw.random(NUM_EXAMPLES)}


def over_clients(values, clients):
    people = Resident(None, clients)
    return metrics.over_clients(people.means(values), people.num_examples)


def test_over_clients_is_what_numpy_says(clients, values, x64):
    owned, stacked = clients
    figures = over_clients({name: jnp.asarray(value) for name, value in values.items()}, stacked)
    for name, value in values.items():
        means = np.array([value[mine].mean() for mine in owned if mine.size])
        worst = means.min() if name == "accuracy" else means.max()  # a tenth of eleven clients is one
        expected = {"mean": means.mean(), "std": means.std(), "worst_decile": worst}
        for figure, wanted in expected.items():
            np.testing.assert_allclose(figures[f"client_{name}_{figure}"], wanted, rtol=1e-6)


def test_each_of_few_clients_has_the_figures_of_its_own_test_set(values, x64):
    def figures(values):
        return {"accuracy": jnp.mean(values["accuracy"]), "most": jnp.max(values["loss"])}

    owned = {"bern": np.array([3, 5, 8]), "ulm": np.array([1])}
    found = metrics.of_each_client(values, owned, figures)
    for client, rows in owned.items():
        np.testing.assert_allclose(found[f"client_test_accuracy/{client}"], values["accuracy"][rows].mean())
        np.testing.assert_allclose(found[f"client_test_most/{client}"], values["loss"][rows].max())
    assert metrics.each_client(found | {"test_loss": 1.0})["ulm"] == {
        "accuracy": values["accuracy"][1],
        "most": values["loss"][1],
    }
    assert metrics.direction("client_test_loss/accuracy") == -1  # a client of this name
    many = {str(client): np.array([0]) for client in range(metrics.FEW + 1)}
    assert metrics.of_each_client(values, many, figures) == {}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("test_f1", 1),
        ("holdout_macro_F1", 1),
        ("test_r2_score", 1),
        ("test_balanced_accuracy", 1),
        ("test_average_precision", 1),
        ("test_relative_l2", -1),
        ("test_loss", -1),
        ("test_brier_score", -1),
        ("personal_recall_std", -1),
        ("client_auc_std", 0),
        ("f1", 0),
    ],
)
def test_a_figures_name_says_whether_higher_is_better(name, wanted):
    assert metrics.direction(name) == wanted


def test_worst_decile_is_a_mean_over_a_tenth_of_the_clients(x64):
    """Of thirty clients with one example each, the three worst."""
    each = Client(jnp.arange(30)[:, None], jnp.ones(30, int))
    value = jnp.asarray(np.random.default_rng(2).permutation(30) / 30.0)
    figures = over_clients({"accuracy": value, "loss": value}, each)
    np.testing.assert_allclose(figures["client_accuracy_worst_decile"], 1 / 30)
    np.testing.assert_allclose(figures["client_loss_worst_decile"], 28 / 30)


def test_clients_without_examples_give_zero_not_nan(values):
    nobody = Client(jnp.zeros((2, 3), int), jnp.zeros(2, int))
    figures = over_clients({"loss": jnp.asarray(values["loss"])}, nobody)
    assert all(np.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("batch_size", [1, 10, NUM_EXAMPLES, 1000])
def test_evaluate_counts_every_example_once(batch_size):
    task = tasks.Task(
        init=None,
        outputs=lambda params, batch: (params * batch["x"], ()),
        loss=None,
        metrics=lambda out, batch: {"loss": out[:, 0]},
    )
    data = {"x": jnp.arange(NUM_EXAMPLES, dtype=jnp.float32)[:, None]}
    found = metrics.make_evaluate(task, batch_size)(jnp.float32(2.0), data)
    np.testing.assert_allclose(found["loss"], 2 * np.arange(NUM_EXAMPLES))
    np.testing.assert_allclose(metrics.overall(found, "test")["test_loss"], NUM_EXAMPLES - 1)


def test_rows_come_back_as_written(tmp_path):
    writer = metrics.Writer(tmp_path / "metrics.jsonl")
    rows = [{"run": "fipa", "round": 0, "test_loss": jnp.float32(0.5), "spectrum": np.array([2.0, 1.0])}]
    rows.append({"run": "fipa", "round": 1, "test_loss": np.float64("nan"), "spectrum": jnp.array([jnp.inf, 1.0])})
    for number, row in enumerate(rows, 1):
        writer.write(row)
        assert len(metrics.read(tmp_path / "metrics.jsonl")) == number, "a row is on the disk when write returns"
    writer.close()
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert first == {"run": "fipa", "round": 0, "test_loss": 0.5, "spectrum": [2.0, 1.0]}
    assert second == {"run": "fipa", "round": 1, "test_loss": None, "spectrum": [None, 1.0]}


def test_jsonable_is_json():
    value = {"a": (jnp.ones(2, bool), np.int32(3), {"b": -np.inf}), "c": "text", "d": None}
    assert json.loads(json.dumps(metrics.jsonable(value), allow_nan=False)) == {
        "a": [[True, True], 3, {"b": None}],
        "c": "text",
        "d": None,
    }


def test_summary_takes_the_last_and_the_best():
    rows = [
        {"run": "fipa", "round": 0, "test_accuracy": 0.5, "test_loss": 3.0, "client_loss_mean": 3.0, "step_ratio": 1.0},
        {"run": "fipa", "round": 1, "test_accuracy": 0.9, "test_loss": 1.0, "step_ratio": 0.1},
        {
            "run": "fipa",
            "round": 2,
            "test_accuracy": 0.8,
            "test_loss": 2.0,
            "client_loss_mean": 4.0,
            "client_loss_std": 1.0,
        },
    ]
    summary = metrics.summarise(rows)
    assert summary["final"] == {"test_accuracy": 0.8, "test_loss": 2.0, "client_loss_mean": 4.0}
    assert summary["best"] == {"test_accuracy": 0.9, "test_loss": 1.0, "client_loss_mean": 3.0}


def test_a_run_that_diverged_says_so_in_its_summary():
    """Its final figure is none, not the last one from before."""
    rows = [{"run": "fipa", "test_loss": loss, "test_mse": None} for loss in (1.0, None)]
    summary = metrics.summarise(rows)
    assert summary == {"final": {"test_loss": None, "test_mse": None}, "best": {"test_loss": 1.0, "test_mse": None}}


PARAMS = {"Dense_0": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}


def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "model.msgpack"
    export(path, PARAMS)
    loaded = load(path, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, loaded, PARAMS)
    assert [found.name for found in tmp_path.iterdir()] == ["model.msgpack"], "no partial file is left"
    export(path, jax.tree.map(lambda leaf: leaf + 1, PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + 1), load(path, PARAMS), PARAMS)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file at .*none\.msgpack"):
        load(tmp_path / "none.msgpack", PARAMS)


OTHER_FILES = [b"", b"not a model", b"\x05", serialization.msgpack_serialize({"a": {"b": np.ones(2)}})]


@pytest.mark.parametrize("damage", [lambda whole: whole[:-9], *(lambda _, other=other: other for other in OTHER_FILES)])
def test_a_damaged_model_is_refused(tmp_path, damage):
    path = tmp_path / "model.msgpack"
    export(path, PARAMS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.msgpack is not a model file, or is damaged"):
        load(path, PARAMS)


@pytest.mark.parametrize(
    "other",
    [
        {"Dense_0": {"kernel": np.zeros((2, 4), np.float32), "bias": np.ones(3, np.float32)}},
        {"Dense_0": {"kernel": np.zeros((2, 3), np.float64), "bias": np.ones(3, np.float32)}},
        {"Dense_1": {"kernel": np.zeros((2, 3), np.float32), "bias": np.ones(3, np.float32)}},
        {"Dense_0": {"kernel": np.zeros((2, 3), np.float32)}},
    ],
    ids=["shape", "dtype", "name", "missing"],
)
def test_another_models_parameters_are_refused(tmp_path, other):
    export(tmp_path / "model.msgpack", PARAMS)
    with pytest.raises(ValueError, match=r"does not fit config\.model and config\.precision: .*Dense_"):
        load(tmp_path / "model.msgpack", other)


def test_rows_within_so_many_seconds_are_counted_for_each_run():
    row = lambda run, k, **seconds: {"run": run, "round": k} | {f"seconds_{n}": s for n, s in seconds.items()}
    rows = [row("a", k, train=0.5, sketch=0.5) for k in range(4)] + [row("b", k, round=2.0) for k in range(4)]
    assert metrics.within(rows, 3.0) == rows[:3] + rows[4:5]
    assert metrics.within(rows, float("inf")) == rows


def test_rows_within_so_many_rounds_or_megabytes_are_counted_for_each_run():
    rows = [{"run": run, "bytes_up": 1e6 * size, "bytes_down": 1e6} for run, size in (("a", 1), ("b", 3)) * 3]
    assert metrics.within(rows, 2, "rounds") == rows[:4]
    assert metrics.within(rows, 4.5, "megabytes") == [rows[0], rows[1], rows[2]]  # two rounds of a, one of b


def test_batches_that_are_spread_over_devices_are_the_same_batches():
    """37 examples in batches of 5: seven whole ones, of which four devices take one each, and the rest as before."""
    data = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(NUM_EXAMPLES, 3)), jnp.float32)}
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), jnp.float32)

    def values(weights, batch):
        return {"sum": jnp.tanh(batch["x"] @ weights).sum(axis=1)}

    found = [jax.jit(metrics.over_examples(values, 5, make_mesh(devices)))(weights, data) for devices in (1, 2, 4)]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0]["sum"], other["sum"])
    np.testing.assert_allclose(found[0]["sum"], values(weights, data)["sum"], atol=1e-6)
