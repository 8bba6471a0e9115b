"""Texts with owners: who owns which window, what a model of them may look at, and the curvature of its loss."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import config as config_lib
from fipa_jax import curvature, tasks, trees
from fipa_jax.models import networks
from fipa_jax.run import experiment, whole_run
from fipa_jax.tasks import text

WORDS = {"ANNE": "abcde" * 9, "BERT": "edcba" * 7 + "ab", "CARL": "abc"}  # 45, 37 and 3 characters


def _arrays(words=WORDS, **changes):
    whole = np.frombuffer("".join(words.values()).encode("utf-32-le"), np.uint32)
    return {"text": whole, "length": np.array([*map(len, words.values())]), "client": np.array([*words])} | changes


@pytest.fixture
def config(tmp_path):
    """arrays, changes of config.task -> a config of a tiny run on their file."""

    def make(arrays=None, **changes):
        np.savez(tmp_path / "words.npz", **(arrays or _arrays()))
        config = config_lib.default()
        config.task.name, config.task.file, config.model.name = "text", str(tmp_path / "words.npz"), "transformer"
        config.task.window, config.task.least_characters = 6, 30
        config.model.width, config.model.layers, config.model.heads = 4, 1, 2
        config.task.update(changes)
        return config

    return make


def _joined(data, windows):
    """The text of windows, one after another: the first character, and whatever is to be predicted."""
    y = data["y"][windows].ravel()
    return "".join("abcde"[i] for i in [data["x"][windows[0], 0], *y[y != text.ABSENT]])


def test_each_text_is_cut_in_time_into_windows_of_its_own(config):
    problem = tasks.build(config(holdout=0.25))
    for client, words in enumerate((WORDS["ANNE"], WORDS["BERT"])):
        end = len(words) - round(0.2 * len(words))
        middle = end - round(0.25 * end)
        assert _joined(problem.train, problem.clients[client]) == words[:middle]
        assert _joined(problem.test, problem.test_clients[client]) == words[end:]
    held = [_joined(problem.holdout, rows) for rows in np.split(np.arange(4), [2])]
    assert held == [WORDS["ANNE"][27:36], WORDS["BERT"][22:30]]
    for data in (problem.train, problem.test, problem.holdout):
        assert data["x"].shape == data["y"].shape and data["x"].shape[1] == 6
        there = data["y"][:, 1:] != text.ABSENT
        np.testing.assert_array_equal(data["x"][:, 1:][there], data["y"][:, :-1][there])
    sizes = [np.sum(data["y"] != text.ABSENT) for data in (problem.train, problem.holdout, problem.test)]
    assert sizes == [26 + 21, 8 + 7, 8 + 6] and len(problem.clients) == 2
    assert problem.baseline[1]["loss"] > 0


WINDOW, SYMBOLS = 5, 3
MODULE = networks.Transformer(SYMBOLS, width=4, layers=1, heads=2, lora_rank=1)
TASK = text.next_symbol(MODULE, WINDOW)
run = jax.jit(TASK.outputs)


def _problem(dtype):
    """(params, batch) of a tiny transformer, the last window of which is short; parameters at random."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(TASK.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), shapes)
    x = rng.integers(0, SYMBOLS, (3, WINDOW + 1))
    y = np.where(np.arange(WINDOW)[None] < np.array([[5], [5], [2]]), x[:, 1:], text.ABSENT)
    return params, {"x": jnp.asarray(x[:, :-1]), "y": jnp.asarray(y)}


def test_a_position_sees_those_before_it_alone():
    params, batch = _problem(jnp.float32)
    before = np.asarray(run(params, batch)[0])
    for place in (1, 4):
        x = np.array(batch["x"])
        x[:, place] = (x[:, place] + 1) % SYMBOLS
        other = np.asarray(run(params, batch | {"x": x})[0])
        np.testing.assert_array_equal(other[:, :place], before[:, :place])
        assert np.all(np.any(other[:, place] != before[:, place], axis=-1))


def test_the_loss_and_the_figures_are_means_over_the_positions_that_are_there():
    params, batch = _problem(jnp.float32)
    out = np.asarray(run(params, batch)[0])
    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    found = jax.jit(TASK.metrics)(out, batch)
    for n, length in enumerate((5, 5, 2)):
        y = np.asarray(batch["y"])[n, :length]
        np.testing.assert_allclose(found["loss"][n], -np.mean(log_p[n, np.arange(length), y]), rtol=1e-5)
        np.testing.assert_allclose(found["accuracy"][n], np.mean(out[n, :length].argmax(-1) == y))


def _dense(params, batch, chosen):
    """1/N sum_n 1/T_n sum_t J_nt^T (diag(p) - p p^T) J_nt in the parameters of a pattern, by its formula."""
    outputs = lambda part: TASK.outputs(trees.replace(params, part), batch)[0]
    rows = jax.jit(jax.jacobian(outputs))(trees.select(params, chosen))
    logits = np.asarray(run(params, batch)[0])
    rows = np.concatenate([np.reshape(leaf, (*logits.shape, -1)) for leaf in jax.tree.leaves(rows)], axis=-1)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = 0
    for n, t in np.argwhere(np.asarray(batch["y"]) != text.ABSENT):
        loss_hessian = np.diag(p[n, t]) - np.outer(p[n, t], p[n, t])
        there = np.sum(np.asarray(batch["y"])[n] != text.ABSENT)
        total = total + rows[n, t].T @ loss_hessian @ rows[n, t] / there / len(logits)
    return total


@pytest.mark.parametrize(
    ("jacobian", "chosen"),
    [
        pytest.param("matrix_free", "lora", marks=pytest.mark.slow),
        ("rows", "head/"),
        ("head", "head/"),
        pytest.param("head", "head/kernel", marks=pytest.mark.slow),
    ],
)
def test_the_curvature_of_a_sequence_is_the_mean_over_its_positions(jacobian, chosen, x64):
    params, batch = _problem(jnp.float64)

    def of_part(part, batch):
        return TASK.outputs(trees.replace(params, part), batch)

    @jax.jit
    def products(part, batch):
        ggn = curvature.make_ggn(
            lambda part, batch: of_part(part, batch)[0],
            TASK.loss,
            jacobian=jacobian,
            features=lambda part, batch: of_part(part, batch)[1].last,
            micro_batch=2,
        )
        matrix = ggn(part, batch)
        return matrix.product(jnp.eye(matrix.size)), matrix.not_last_layer

    found, not_last_layer = products(trees.select(params, chosen), batch)
    wanted = _dense(params, batch, chosen)
    assert not not_last_layer and np.linalg.matrix_rank(wanted) > 3
    np.testing.assert_allclose(found, wanted, atol=1e-12 * np.abs(wanted).max())


def test_adapters_begin_as_the_model_without_them():
    x = np.arange(10).reshape(2, 5) % SYMBOLS
    params = jax.jit(MODULE.init)(jax.random.key(1), x)["params"]
    without = {path: leaf for path, leaf in trees.paths(params).items() if "lora" not in path}
    assert len(trees.paths(params)) == len(without) + 2 * 6
    plain = jax.jit(lambda params: MODULE.clone(lora_rank=0).apply({"params": params}, x)[0])
    np.testing.assert_allclose(plain(trees.nested(without)), run(params, {"x": x})[0], rtol=1e-6)
    moved = trees.replace(params, {path: leaf + 1 for path, leaf in trees.select(params, "lora").items()})
    assert not np.allclose(plain(trees.nested(without)), run(moved, {"x": x})[0])


@pytest.mark.slow
def test_adapters_alone_are_trained(config):
    config = config()
    config.model.lora_rank, config.fipa.trainable = 1, "lora"
    config.fipa.sketch.rank, config.fipa.sketch.solver, config.compare = 3, "auto", ("fipa",)
    experiment.build(config)  # which goes through a round by shapes alone


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "^head/"])
def test_every_client_has_its_own_figures(config, tmp_path, trainable):
    config = config()
    config.model.lora_rank, config.fipa.trainable, config.fipa.cache_body = 1, trainable, trainable == "^head/"
    config.fipa.rounds, config.fipa.sketch.rank, config.fipa.sketch.solver = 2, 3, "auto"
    config.compare = ("fipa",)
    final = whole_run.run(config, str(tmp_path / "run"))["runs"]["fipa"]["final"]
    assert {"test_loss", "test_accuracy", "client_test_loss_mean", "client_test_loss_worst_decile"} <= set(final)
    assert all(np.isfinite(value) for value in final.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": np.zeros(3)}, r"has text float64\[3\], length"),
        ({"length": np.array([45, 37, 4])}, "has 85 characters in text, 86 by the lengths of 3 clients"),
        ({"client": np.array(["A", "B"])}, "has 85 characters in text, 85 by the lengths of 2 clients"),
        ({"client": np.array([{}, 1, 2])}, "is no .npz with text, length, client"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(config, changes, words):
    with pytest.raises(ValueError, match=rf"^config\.task\.file: .*{words}"):
        tasks.build(config(_arrays(**changes)))


def test_what_is_too_short_or_not_there_is_said(config):
    with pytest.raises(ValueError, match=r"least_characters: none of 3 clients has 100 characters, .* has 45; lower"):
        tasks.build(config(least_characters=100))
    with pytest.raises(ValueError, match=r"least_characters: a text of 3 characters is too short to be cut"):
        tasks.build(config(least_characters=1))
    broken = config()
    broken.task.file = "nowhere.npz"
    with pytest.raises(FileNotFoundError, match=r"no file at 'nowhere\.npz'; .*prepare_data\.py shakespeare"):
        tasks.build(broken)
    broken.model.heads = 3
    with pytest.raises(ValueError, match=r"config\.model\.heads: needs to divide config\.model\.width = 4, got 3"):
        tasks.build(broken)


@pytest.mark.parametrize(("variant", "least"), [("", 9), ("whole", 3), ("lora", 3), ("head", 3), ("tune", 45)])
def test_the_speakers_config_has_valid_methods_of_each_part(variant, least):
    path = Path(__file__).resolve().parents[2] / "configs" / "shakespeare.py"
    config = runpy.run_path(str(path))["get_config"](variant)
    config_lib.validate(config)
    assert len(set(config.compare)) == len(config.compare) >= least


def test_a_transformer_of_what_is_no_sequence_is_refused():
    with pytest.raises(ValueError, match=r"'transformer' needs whole numbers \[B, T\], got float32 of 3"):
        MODULE.init(jax.random.key(0), jnp.zeros([1, 3]))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (_arrays(client=np.array(["ANNE", "BERT", "ANNE"])), "names client 'ANNE' 2 times; join the texts of each"),
        (_arrays(text=np.full(85, 0x110000, np.uint32)), "has a character 1114112 in text, which is no code point"),
    ],
)
def test_owners_are_told_apart_and_characters_are_some(config, arrays, said):
    with pytest.raises(ValueError, match=rf"^config\.task\.file: .*{said}"):
        tasks.build(config(arrays))
