"""A user's own arrays: who owns what, what is set apart, and what a wrong file is told."""

import itertools

import jax
import numpy as np
import pytest

from fipa_jax import config as config_lib
from fipa_jax import tasks
from fipa_jax.config import recipes
from fipa_jax.reporting import metrics
from fipa_jax.run import whole_run
from fipa_jax.saving import model_files
from fipa_jax.tasks import own_data

NUM_EXAMPLES, WIDTH = 40, 3


def _arrays(**changes):
    """x [N, d], whose last column has three values, and y [N, 2] as a function of it."""
    draw = np.random.default_rng(0)
    x = draw.normal(2, 3, size=(NUM_EXAMPLES, WIDTH))
    x[:, -1] = np.arange(NUM_EXAMPLES) % 3
    return {"x": x, "y": 5 + 4 * np.stack([np.sin(x[:, 0]), x[:, 1]], 1)} | changes


@pytest.fixture
def config(tmp_path):
    """arrays, changes of config.task -> a config of a tiny run on their file."""

    def make(arrays, **changes):
        file = tmp_path / "mine.npz"
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
        config = config_lib.default()
        config.task.name, config.task.file, config.task.num_clients = "own_data", str(file), 3
        config.model.widths = (3,)
        config.fipa.rounds, config.fipa.sketch.rank = 2, 3
        config.task.update(changes)
        return config

    return make


def _whole(problem):
    """The rows [x, y] of training and test set, in an order of their own."""
    rows = np.concatenate([np.c_[part["x"], part["y"]] for part in (problem.train, problem.test)])
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("split", own_data.SPLITS)
def test_every_example_has_one_owner_or_is_for_the_test(config, split):
    arrays = _arrays(client=np.arange(NUM_EXAMPLES) % 4 * 7)
    problem = tasks.build(config(arrays, split=split, standardise="none"))
    rows = np.c_[arrays["x"], arrays["y"]].astype(np.float32)
    np.testing.assert_array_equal(_whole(problem), rows[np.lexsort(rows.T)])
    assert len(problem.test["x"]) == 8
    assert sorted(np.concatenate(problem.clients)) == list(range(32))
    assert len(problem.clients) == (4 if split == "given" else 3)


def test_the_seed_draws_test_set_and_clusters(config):
    once, again, other = (tasks.build(config(_arrays(), split="kmeans", seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once.test["x"], again.test["x"])
    for mine, same in zip(once.clients, again.clients, strict=True):
        np.testing.assert_array_equal(mine, same)
    assert not np.array_equal(once.test["x"], other.test["x"])


def test_a_test_set_of_the_file_is_taken_as_it_is(config):
    arrays = _arrays() | {f"{name}_test": array[:5] for name, array in _arrays().items()}
    problem = tasks.build(config(arrays, standardise="none"))
    assert len(problem.train["x"]) == NUM_EXAMPLES
    for name in ("x", "y"):
        np.testing.assert_array_equal(problem.test[name], arrays[name][:5].astype(np.float32))


def test_standardised_by_the_moments_of_the_training_set(config):
    arrays = _arrays(x=np.c_[_arrays()["x"], np.full(NUM_EXAMPLES, 0.1)])
    arrays |= {f"{name}_test": array[:5] + 1 for name, array in arrays.items()}
    settings = config(arrays)
    settings.precision = "float64"
    problem = tasks.build(settings)
    np.testing.assert_array_equal(problem.train["x"][:, -1], 0.1)
    np.testing.assert_array_equal(problem.test["x"][:, -1], 1.1)
    for name, columns in (("x", WIDTH), ("y", 2)):
        found, plain = problem.train[name][:, :columns], arrays[name][:, :columns]
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-12)
        np.testing.assert_allclose(found.std(0), 1, rtol=1e-12)
        wanted = (arrays[f"{name}_test"][:, :columns] - plain.mean(0)) / plain.std(0)
        np.testing.assert_allclose(problem.test[name][:, :columns], wanted, rtol=1e-12)


def test_targets_may_be_one_column_and_integers(config):
    problem = tasks.build(config(_arrays(y=np.arange(NUM_EXAMPLES)), standardise="none"))
    assert problem.train["y"].shape == (32, 1) and problem.train["y"].dtype == np.float32


def test_a_column_of_few_values_gives_each_a_client(config):
    problem = tasks.build(config(_arrays(), column=WIDTH - 1, num_clients=5, standardise="none"))
    owned = [np.unique(problem.train["x"][own, -1]).tolist() for own in problem.clients]
    assert owned == [[0], [1], [2]]


def test_a_column_of_many_values_is_cut_into_equal_parts(config):
    problem = tasks.build(config(_arrays(), column=0, num_clients=4))
    assert [len(own) for own in problem.clients] == [8] * 4
    parts = [problem.train["x"][own, 0] for own in problem.clients]
    assert all(low.max() < high.min() for low, high in itertools.pairwise(parts))


def test_kmeans_finds_clusters_whatever_the_units(config):
    """One column of large numbers that says nothing beside a small one that does."""
    draw = np.random.default_rng(1)
    cluster = np.arange(NUM_EXAMPLES) % 2
    x = np.stack([1e6 * draw.uniform(size=NUM_EXAMPLES), 1e-6 * (cluster + 1e-2 * draw.normal(size=NUM_EXAMPLES))], 1)
    x = np.c_[x, x[:, 1]]  # told twice, so that the cut through it is the better one
    problem = tasks.build(config(_arrays(x=x), split="kmeans", num_clients=2, standardise="none"))
    for own in problem.clients:
        assert len(np.unique(problem.train["x"][own, 1] > 0.5e-6)) == 1


@pytest.mark.slow
def test_a_run_on_own_arrays_learns(config, tmp_path):
    settings = config(_arrays(y=_arrays()["x"][:, :2]), split="kmeans")
    settings.fipa.local.optimizer, settings.fipa.local.steps, settings.fipa.rounds = "lbfgs", 2, 8
    settings.compare = ("fipa", "fedavg:local.optimizer=gauss_newton:local.gauss_newton.system=cg")
    whole_run.run(settings, tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    for name in settings.compare:
        losses = [row["test_mse"] for row in rows if row["run"] == name]
        assert losses[-1] < losses[0] / 2


def _with(name, row, value):
    array = _arrays()[name].copy()
    array[row, 0] = value
    return {name: array}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": None}, "has no array 'x'; write one with np.savez"),
        ({"y": None}, "has no array 'y'"),
        ({"x": np.zeros(NUM_EXAMPLES)}, r"x of shape \[40\]; make it \[N, d\].*reshape"),
        ({"y": np.zeros((NUM_EXAMPLES, 1, 1))}, r"y of shape \[40, 1, 1\]; make it \[N\] or \[N, K\]"),
        ({"y": np.zeros(NUM_EXAMPLES - 1)}, "40 rows in x but 39 in y"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "nothing is in there"),
        (_with("x", 3, np.nan), "NaN or infinity in 1 rows of x, first in row 3"),
        (_with("y", slice(4, 6), np.inf), "in 2 rows of y, first in row 4"),
        ({"x": np.full((NUM_EXAMPLES, 2), "a")}, "'x' of dtype <U1; save real numbers"),
        ({"x": np.zeros((NUM_EXAMPLES, 2), complex)}, "'x' of dtype complex128"),
        ({"x": np.full((NUM_EXAMPLES, 2), None)}, "a 'x' that cannot be read.*nothing is unpickled"),
        (
            {"client": np.zeros(NUM_EXAMPLES)},
            r"client of dtype float64 and shape \[40\]; make it integers or words \[40\]",
        ),
        ({"client_test": np.zeros(3, int)}, "has client_test, but not both client and x_test"),
        ({"client": np.zeros(3, int)}, r"shape \[3\]; make it integers or words \[40\]"),
        ({"x_test": _arrays()["x"]}, "one of x_test and y_test"),
        ({"x_test": np.zeros((5, 9)), "y_test": np.zeros((5, 2))}, "3 columns in x but 9 in x_test"),
        ({"x_test": np.zeros((5, WIDTH)), "y_test": np.zeros(5)}, "2 columns in y but 1 in y_test"),
        ({"x_test": np.zeros((5, WIDTH)), "y_test": np.full((5, 2), np.nan)}, "5 rows of y_test, first in row 0"),
        (
            {"x": np.zeros((1, 2)), "y": np.zeros(1)},
            r"has 1 examples, of which config\.task\.test_fraction = 0\.2 leaves",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_told_what_to_change(config, arrays, said):
    with pytest.raises(ValueError, match=rf"config\.task\.file: .*mine\.npz'.* {said}"):
        tasks.build(config(_arrays(**arrays)))


@pytest.mark.parametrize("file", ["", "nonesuch.npz"])
def test_a_missing_file_is_named(config, file):
    with pytest.raises(FileNotFoundError, match=rf"config\.task\.file: no file at '{file}'; give the path"):
        tasks.build(config(_arrays(), file=file))


@pytest.mark.parametrize("content", [b"", b"1,2\n3,4\n", b"PK\x03\x04 and no more"], ids=["empty", "csv", "cut"])
def test_another_kind_of_file_is_no_npz(config, tmp_path, content):
    other = tmp_path / "other.npz"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.task\.file: .* is no \.npz archive.*nothing is unpickled"):
        tasks.build(config(_arrays(), file=str(other)))


def test_a_bare_array_is_no_npz(config, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"config\.task\.file: .* one bare array"):
        tasks.build(config(_arrays(), file=str(tmp_path / "x.npy")))


@pytest.mark.parametrize(
    ("arrays", "changes", "said"),
    [
        ({}, {"split": "kmean"}, r"task\.split: unknown 'kmean'; known: column, given, kmeans"),
        ({}, {"split": "given"}, r"task\.split: 'given' needs an array client.*config\.task\.file"),
        ({}, {"column": WIDTH}, r"task\.column: x of config\.task\.file has columns 0 to 2, got 3"),
        ({}, {"column": -1}, r"task\.column: "),
        ({}, {"inputs": ("a",)}, r"task\.inputs: names columns of a table, and .*mine\.npz' holds arrays"),
        ({}, {"targets": ("a", "b")}, r"task\.targets: names columns of a table"),
        ({}, {"num_clients": 33}, r"task\.num_clients: 33 clients .*config\.task\.file has 32 to train on; lower it"),
        ({}, {"num_clients": 33, "split": "kmeans"}, r"task\.num_clients: 33 clients"),
        (
            _with("x", slice(0, 30), 0.5),
            {"num_clients": 3},
            r"task\.num_clients: column 0 .* of 3 quantile bins only \d hold examples; lower it",
        ),
        (
            {"x": np.repeat([[0.0, 1.0]], NUM_EXAMPLES, 0)},
            {"split": "kmeans"},
            r"task\.num_clients: of 3 clusters of x .* some have no example; lower it",
        ),
        ({}, {"holdout": 0.01}, r"task\.holdout: 0\.01 of 32 training examples are 0 of them; raise it"),
        (
            {"client": np.arange(NUM_EXAMPLES)},
            {"split": "given"},
            r"task\.file: .* leaves client \d+ nothing to train on.*lower config\.task\.test_fraction",
        ),
    ],
)
def test_a_split_that_does_not_exist_names_its_field(config, arrays, changes, said):
    with pytest.raises(ValueError, match=rf"config\.{said}"):
        tasks.build(config(_arrays(**arrays), **changes))


def _labels(kind):
    names = np.array(["benign", "malign", "unclear"])[: 2 if kind == "two" else 3]
    label = np.arange(NUM_EXAMPLES) % len(names)
    return {"two": names[label], "words": names[label], "numbers": label * 7 - 7}[kind], label


@pytest.mark.parametrize("kind", ["two", "words", "numbers"])
def test_classes_are_learned_by_their_names(config, kind):
    y, label = _labels(kind)
    problem = tasks.build(config(_arrays(y=y), kind="classes" if kind == "numbers" else "auto"))
    assert problem.classes == tuple(str(name) for name in sorted(set(y.tolist())))
    counted = np.bincount(np.concatenate([problem.train["label"], problem.test["label"]]))
    np.testing.assert_array_equal(counted, np.bincount(label))
    params = problem.task.init(jax.random.key(0))
    logits, _ = problem.task.outputs(params, problem.train)
    assert logits.shape == (32, 1 if kind == "two" else 3)
    assert problem.task.loss(logits, problem.train).shape == (32,)


def test_numbers_are_no_classes_unless_it_is_said(config, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        problem = tasks.build(config(_arrays(y=np.arange(NUM_EXAMPLES) % 3)))
    assert "y" in problem.train and not problem.classes
    assert "config.task.kind=classes" in caplog.text


@pytest.mark.parametrize(
    ("y", "kind", "said"),
    [
        (np.full(NUM_EXAMPLES, "a"), "auto", "has one class alone"),
        (np.arange(NUM_EXAMPLES) / 3, "classes", "no whole numbers; classes need to be"),
        (np.zeros((NUM_EXAMPLES, 2)), "classes", "2 targets for each example; classes need one"),
        (np.full(NUM_EXAMPLES, "a"), "regression", "words as targets: set config.task.kind"),
        (np.arange(NUM_EXAMPLES).astype(str), "auto", "has a class '[0-9]+' that is in no example to train on"),
        (np.full((NUM_EXAMPLES, 2), "a"), "auto", r"words in y of shape \[40, 2\]"),
    ],
)
def test_targets_that_are_no_classes_are_told_what_to_change(config, y, kind, said):
    with pytest.raises(ValueError, match=rf"config\.task\.file: .*mine\.npz' .*{said}"):
        tasks.build(config(_arrays(y=y), kind=kind))


def test_a_holdout_is_set_apart_before_anybody_owns_it(config):
    problem = tasks.build(config(_arrays(client=np.arange(NUM_EXAMPLES) % 4), split="given", holdout=0.25))
    assert [len(part["x"]) for part in (problem.train, problem.test, problem.holdout)] == [24, 8, 8]
    rows = np.concatenate([part["x"][:, 0] for part in (problem.train, problem.test, problem.holdout)])
    assert len(np.unique(rows)) == NUM_EXAMPLES
    assert sum(map(len, problem.clients)) == 24


def test_clients_by_name_have_test_examples_of_their_own(config):
    x, client = _arrays()["x"], np.array(["Ulm", "Basel"])[np.arange(NUM_EXAMPLES) % 2]
    x[:, 0] = np.arange(NUM_EXAMPLES) % 2  # tells the owner
    problem = tasks.build(config(_arrays(x=x, client=client), split="given", standardise="none"))
    for place, (train, test) in enumerate(zip(problem.clients, problem.test_clients, strict=True)):
        assert np.all(problem.train["x"][train, 0] == 1 - place)  # Basel comes first
        assert np.all(problem.test["x"][test, 0] == 1 - place)
    assert sum(map(len, problem.test_clients)) == len(problem.test["x"])
    assert problem.names == ("Basel", "Ulm")


def test_the_constant_answer_of_a_regression_is_the_mean(config):
    problem = tasks.build(config(_arrays()))
    words, figures = problem.baseline
    assert "mean" in words
    mean = problem.train["y"].mean(0)
    np.testing.assert_allclose(figures["mse"], np.mean((problem.test["y"] - mean) ** 2), rtol=1e-5)


@pytest.mark.slow
def test_a_run_on_classes_shows_all_figures(config, tmp_path, capsys):
    y, label = _labels("two")
    x = _arrays()["x"] + 4 * label[:, None]
    settings = config(_arrays(x=x, y=y, client=np.arange(NUM_EXAMPLES) % 2), split="given", num_clients=2)
    settings.fipa.local.optimizer, settings.fipa.local.weight_decay = "gauss_newton", 0.01
    settings.compare = ("fipa",)
    final = whole_run.run(settings, tmp_path / "run")["runs"]["fipa"]["final"]
    assert {"test_accuracy", "test_balanced_accuracy", "test_auc", "test_loss", "client_test_accuracy_mean"} <= set(
        final
    )
    own = [final[f"client_test_accuracy/{client}"] for client in (0, 1)]
    np.testing.assert_allclose(np.mean(own), final["client_test_accuracy_mean"], rtol=1e-6)
    assert final["test_accuracy"] > 0.8
    assert "always the largest class" in capsys.readouterr().out
    assert "always the largest class" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("trust", [False, True])
def test_newton_rounds_with_weight_decay_end_at_the_pooled_optimum(config, tmp_path, trust):
    """Logistic regression: the step of every round is Newton's on all clients' examples."""
    y, label = _labels("two")
    settings = config(_arrays(y=y, client=label), split="given")
    settings.precision, settings.model.widths, l2 = "float64", (), 0.05
    recipes.levenberg_marquardt(settings)
    settings.fipa.local.weight_decay = settings.fipa.aggregator.damping = l2
    settings.fipa.aggregator.trust, settings.fipa.rounds = trust, 25 if trust else 6
    settings.fipa.sketch.solver, settings.fipa.sketch.rank = "rows", 4
    settings.compare = ("fipa",)
    whole_run.run(settings, tmp_path / "run")
    layer = model_files.load(tmp_path / "run" / "fipa.msgpack")["Dense_0"]
    with jax.enable_x64(True):
        train = tasks.build(settings).train
    x, wanted = np.c_[train["x"], np.ones(len(train["x"]))], np.zeros(WIDTH + 1)
    for _ in range(30):  # Newton's method in NumPy
        p = 1 / (1 + np.exp(-x @ wanted))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) / len(x) + l2 * np.eye(WIDTH + 1)
        wanted -= np.linalg.solve(hessian, x.T @ (p - train["label"]) / len(x) + l2 * wanted)
    np.testing.assert_allclose(np.r_[layer["kernel"][:, 0], layer["bias"]], wanted, atol=1e-4)


def _owned(**changes):
    """Two clients by name, in units of their own, with test examples of each."""
    arrays, client = _arrays(), np.array(["Ulm", "Basel"])[np.arange(NUM_EXAMPLES) % 2]
    arrays["x"][client == "Ulm"] = 10 * arrays["x"][client == "Ulm"] + 7
    test = {f"{name}_test": array[:9] for name, array in arrays.items()}
    return arrays | test | {"client": client, "client_test": client[:9]} | changes


def test_each_client_may_be_standardised_by_its_own_moments(config):
    problem = tasks.build(config(_owned(), split="given", standardise="client"))
    for own in problem.clients:
        np.testing.assert_allclose(problem.train["x"][own].mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(problem.train["x"][own].std(0), 1, atol=1e-5)
    np.testing.assert_array_equal(problem.test["x"], problem.train["x"][:9])
    assert [len(own) for own in problem.test_clients] == [4, 5]  # Basel, Ulm


def test_what_all_examples_of_a_client_share_becomes_nothing(config):
    """Its level is its own unit, as a mean is: also that of a client with one example."""
    arrays = {name: array.copy() for name, array in _owned().items()}
    ulm = arrays["client"] == "Ulm"
    arrays["x"][ulm, 0], arrays["x_test"][arrays["client_test"] == "Ulm", 0] = 0.7, 1.7
    arrays["client"][1] = arrays["client_test"][1] = "Jena"  # one example, and its twin in the test set
    problem = tasks.build(config(arrays, split="given", standardise="client"))
    train, test = problem.train["x"], problem.test["x"]
    np.testing.assert_array_equal(train[ulm, 0], 0)
    np.testing.assert_allclose(test[problem.test_clients[2], 0], 1, rtol=1e-6)
    assert problem.names == ("Basel", "Jena", "Ulm")
    np.testing.assert_array_equal(train[1], 0)
    np.testing.assert_array_equal(test[1, 1:], 0)
    pooled = tasks.build(config(_arrays(x=np.full((NUM_EXAMPLES, 1), 70.0)), split="kmeans", num_clients=1))
    np.testing.assert_array_equal(pooled.train["x"], 70)


@pytest.mark.parametrize("changes", [{"client_test": None}, {"client": None, "client_test": None}])
def test_a_clients_own_moments_need_to_be_known(config, changes):
    split = "given" if "client" not in changes else "kmeans"
    with pytest.raises(ValueError, match=r"config\.task\.standardise: 'client' needs"):
        tasks.build(config(_owned(**changes), split=split, standardise="client"))


def test_who_is_tested_has_to_be_trained(config):
    with pytest.raises(ValueError, match="test examples of client 'Bern', who has none to train on"):
        tasks.build(config(_owned(client_test=np.array(["Bern"] * 9)), split="given"))


def test_inputs_of_nobody_scale_those_of_clients_and_are_public(config):
    draw = np.random.default_rng(1)
    nobodys = draw.normal(1, 5, size=(20, WIDTH))
    arrays = _arrays(x_public=nobodys, x_test=draw.normal(size=(4, WIDTH)), y_test=np.zeros([4, 2]))
    problem = tasks.build(config(arrays, standardise="public"))
    scaled = (arrays["x"] - nobodys.mean(0)) / nobodys.std(0)
    np.testing.assert_allclose(np.asarray(problem.train["x"]), scaled, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(problem.train["y"]), arrays["y"], rtol=1e-6)  # targets stay
    assert problem.public is not None and problem.public.keys() == problem.train.keys()
    np.testing.assert_allclose(np.asarray(problem.public["x"]).std(0), 1, rtol=1e-4)
    assert problem.public["y"].shape == (20, 2) and not problem.public["y"].any()
    assert tasks.build(config(_arrays())).public is None
    with pytest.raises(ValueError, match="needs an array x_public"):
        tasks.build(config(_arrays(), standardise="public"))
    with pytest.raises(ValueError, match="3 columns in x but 2 in x_public"):
        tasks.build(config(_arrays(x_public=nobodys[:, :2])))


def test_arrays_have_no_columns_whose_owner_could_be_named(config):
    with pytest.raises(ValueError, match=r"config\.task\.client: names a column of a table, .* got 'hospitl'"):
        tasks.build(config(_arrays(client=np.arange(NUM_EXAMPLES) % 4), client="hospitl"))


def test_classes_that_float64_does_not_tell_apart_are_refused(config):
    y = 2.0**53 + 2 * (np.arange(NUM_EXAMPLES) % 3)
    with pytest.raises(ValueError, match=r"classes of 2\^53 and above"):
        tasks.build(config(_arrays(y=y), kind="classes"))
