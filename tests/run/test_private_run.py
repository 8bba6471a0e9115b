"""A private run: what it says and hides, what it refuses, and that it neither overspends nor spends twice."""

import importlib.util
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import tiny

from fipa_jax.federation.state import State
from fipa_jax.privacy import accounting, mechanism
from fipa_jax.privacy.noisy_sum import PrivacyRates
from fipa_jax.reporting import console
from fipa_jax.run import experiment, phase_parts, private_run, whole_run
from fipa_jax.run.personal_stage import People
from fipa_jax.saving import provenance
from fipa_jax.saving.journal import SECRETS, Journal
from fipa_jax.saving.model_files import load
from fipa_jax.saving.signals import Signals
from fipa_jax.tasks.task import Problem, Task

ROOT = Path(__file__).resolve().parents[2]

WHITENED = "fedavg:privacy.whitening=public:privacy.eigenpairs=5:local.lr=1"
OPTIONAL = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting, the extra `dp`, is not installed"
)


USUAL = {"task.num_clients": 2, "task.examples_per_client": 50}  # by default, which images do not read


def private(**fields):
    """Three private rounds with six clients."""
    config = tiny(compare=("fedavg", WHITENED), cohort=0)
    config.task.num_clients, config.eval.clients_every, config.fipa.rounds = 6, 0, 3
    config.fipa.privacy.epsilon, config.fipa.privacy.delta = 8.0, 1e-2
    config.update_from_flattened_dict(fields)
    return config


def rows_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("private")
    return folder, whole_run.run(private(), folder)


def test_rows_say_what_is_spent_and_nothing_of_single_clients(ended):
    folder, summary = ended
    rows = rows_in(folder)
    plan = accounting.Plan(accounting.noise_for(8.0, 3, accounting.Plan(0.0, 1e-2)), 1e-2)
    spent = [row["epsilon"] for row in rows if row["run"] == "fedavg"]
    np.testing.assert_allclose(spent, [accounting.epsilon_of(plan, rounds) for rounds in (1, 2, 3)])
    assert spent[-1] <= 8
    allowed = ("run", "round", "test_", "bytes_", "skipped", "epsilon", "delta")
    assert not [name for row in rows for name in row if not name.startswith(allowed)]
    assert summary["runs"][WHITENED]["epsilon"] == spent[-1] and summary["runs"]["fedavg"]["delta"] == 1e-2
    said, page = console.spent(summary), (folder / "report.html").read_text()
    assert said.count("has spent epsilon 8 at delta 0.01") == 2 and ">epsilon<" in page and ">seconds<" not in page
    assert not (folder / "split.png").exists() and "constant" not in json.loads((folder / "start.json").read_text())
    secrets = json.loads((folder / SECRETS).read_text())
    assert len(set(secrets.values())) == 2 and (folder / SECRETS).stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_the_seed_does_not_tell_the_noise(ended, tmp_path):
    whole_run.run(private(compare=("fedavg",)), tmp_path)
    figures = [row["test_mse"] for row in rows_in(tmp_path)]
    assert figures != [row["test_mse"] for row in rows_in(ended[0]) if row["run"] == "fedavg"]


@pytest.mark.parametrize("seconds", [pytest.param(0.0, marks=pytest.mark.slow), 1e6])
def test_a_run_that_goes_on_has_the_same_noise_and_no_other_budget(tmp_path, seconds):
    """Killed after two rounds, with checkpoints of them or with none, it is the run that was not killed."""
    config = private(compare=("fedavg",), **{"checkpoint.seconds": seconds})
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    for name in ("whole", "cut"):
        (tmp_path / name / SECRETS).write_text(json.dumps({"fedavg": 12345}))
    whole_run.run(config, tmp_path / "whole")

    def stop(row):
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_run.run(config, tmp_path / "cut", on_row=stop)
    whole_run.run(config, tmp_path / "cut")
    figures = [[(row["test_mse"], row["epsilon"]) for row in rows_in(tmp_path / name)] for name in ("whole", "cut")]
    assert figures[0] == figures[1]


X, LISTS = {"x": np.zeros([4, 2])}, [np.arange(2), np.arange(2, 4)]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((name, {"x": np.ones([4, 2])}) for name in ("train", "test", "holdout", "public")),
        *((name, LISTS[::-1]) for name in ("clients", "test_clients", "owned", "tests")),
        *((name, [np.arange(1), np.arange(1, 4)]) for name in ("clients", "test_clients")),
    ],
)
def test_other_data_of_any_kind_have_other_noise(tmp_path, name, other):
    """The same secret on the disk, of runs whose data differ in one thing alone, or in none."""
    people, problem = People(LISTS, LISTS), Problem(None, X, X, X, LISTS, test_clients=LISTS, public=X)
    of = {"people": people} if name in People._fields else {"problem": problem}
    changed = {where: record._replace(**{name: other}) for where, record in of.items()}
    secrets = []
    for change in ({}, {"problem": problem._replace(train=dict(X))}, changed):
        data = provenance.of_data(**{"problem": problem, "params": {}, "people": people} | change)
        journal = Journal(tmp_path, tiny().checkpoint, None, None, {"data": data}, Signals())
        secrets.append(journal.secret("fedavg"))
        journal.close()
    assert secrets[0] == secrets[1] != secrets[2]


def begun(config, history=None):
    """The channel's state with which the phase begins, or goes on from `history` after two rounds."""
    people = SimpleNamespace(num_examples=np.ones(config.task.num_clients))
    channel = private_run.channel_of(config, config.fipa, None, config.task.num_clients)
    history = channel.init({"a": jnp.zeros([2, 1])}) if history is None else history._replace(rounds=jnp.int32(2))
    given, rates = SimpleNamespace(config=config, population=people), phase_parts.make_rates(config.fipa, "float32")
    return private_run.begin(given, config.fipa, rates, State(*[()] * 6, history=history), lambda: 1)[1].history


SAMPLED = {"fipa.privacy.sampling": "poisson", "task.num_clients": 100, "cohort": 80}
RELEASED = {"fipa.privacy.whitening": "release"}


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ({}, {"fipa.privacy.noise_multiplier": 2.0}, "the noise multiplier 1, and would now have 2"),
        ({}, {"fipa.privacy.delta": 1e-3}, "the delta 0.01, and would now have 0.001"),
        (SAMPLED, {"cohort": 2}, "the clients' share 0.8, and would now have 0.02"),
        (SAMPLED, {"fipa.rounds": 10**9}, "a cohort's room of 9., and would now have 100"),
        (RELEASED, {"fipa.privacy.release_share": 0.8}, "the release's mu"),
    ],
)
def test_a_run_goes_on_by_the_plan_that_its_rounds_are_counted_by_alone(monkeypatch, was, now, words):
    monkeypatch.setattr(accounting, "affordable", lambda epsilon, most, plan: most)  # not what is tested, and slow
    monkeypatch.setattr(private_run, "second_moments", lambda *_: None)
    monkeypatch.setattr(mechanism, "released_frame", lambda *_: ())
    config = private(**{"fipa.privacy.noise_multiplier": 1.0, **was})
    history = begun(config)
    assert history.plan.noise == begun(config, history).plan.noise == 1
    config.update_from_flattened_dict(now)
    with pytest.raises(ValueError, match=f"--resume: the run's rounds so far had {words}"):
        begun(config, history)


def test_a_private_method_does_not_go_on_from_a_warm_up_without_privacy():
    journal = SimpleNamespace(started_from=lambda params: params, start={"a": 1})
    with pytest.raises(ValueError, match="--resume: the methods began with the model of the run's warm-up"):
        whole_run.started_from(SimpleNamespace(config=private(), params={}), journal)
    assert whole_run.started_from(SimpleNamespace(config=tiny(), params={}), journal) == {}


def test_the_phase_stops_when_the_budget_is_spent(tmp_path):
    config = private(compare=("fedavg",), **{"fipa.privacy.noise_multiplier": 1.0, "fipa.privacy.epsilon": 4.0})
    plan = accounting.Plan(1.0, 1e-2)
    affords = accounting.affordable(4.0, 3, plan)
    assert 0 < affords < 3
    whole_run.run(config, tmp_path)
    rows = rows_in(tmp_path)
    assert len(rows) == affords and rows[-1]["epsilon"] <= 4 < accounting.epsilon_of(plan, affords + 1)


def test_a_method_beside_private_ones_may_do_without():
    """By a budget of 0 of its own, whatever else it has from the private phase."""
    phase_parts.check(private(compare=("fedavg", "fipa:privacy.epsilon=0"), **{"fipa.privacy.clip_decay": 0.9}))
    by_hand = {"fipa.privacy.epsilon": 0.0, "fipa.privacy.clip": 1.0, "compare": ("fedavg:privacy.epsilon=8", "fedavg")}
    phase_parts.check(private(**by_hand))


def test_a_model_of_public_data_gives_a_part_of_the_first_model(tmp_path, ended):
    config = private(init_from=str(ended[0] / "fedavg.msgpack"), init_paths="Dense_0")
    fresh, started = (experiment.build(one).params for one in (private(), config))
    theirs = load(ended[0] / "fedavg.msgpack", fresh)
    np.testing.assert_array_equal(started["Dense_0"]["kernel"], theirs["Dense_0"]["kernel"])
    np.testing.assert_array_equal(started["Dense_1"]["kernel"], fresh["Dense_1"]["kernel"])
    with pytest.raises(ValueError, match="init_paths: no parameter path matches"):
        experiment.build(private(init_from=str(ended[0] / "fedavg.msgpack"), init_paths="nonesuch"))


@pytest.mark.slow
def test_a_wide_models_public_frame_is_that_of_its_rows(monkeypatch):
    draw = np.random.default_rng(0)
    params, x = {"a": draw.normal(size=(3, 2)).astype(np.float32)}, draw.normal(size=(5, 3)).astype(np.float32)
    task = Task(
        None, lambda theta, batch: (batch["x"] @ theta["a"], ()), lambda out, batch: jnp.sum(out**2, axis=1) / 2, None
    )
    rates = PrivacyRates(*[None] * 4, jnp.float32(0.1), None, None, {"x": jnp.asarray(x)})
    change, moved = jnp.asarray(draw.normal(size=6), jnp.float32), []
    for most in (private_run.MOST_ENTRIES, 0):
        monkeypatch.setattr(private_run, "MOST_ENTRIES", most)
        moved.append(mechanism.out_of(private_run.public_frame(task, 4, params, None, rates), change))
    np.testing.assert_allclose(*moved, atol=1e-4)
    values, vectors = np.linalg.eigh(np.kron(x.T @ x / 5, np.eye(2)))
    scale = 1 / np.sqrt(np.where(np.arange(6) < 2, 0, values) / 0.1 + 1)
    np.testing.assert_allclose(moved[0], vectors * scale @ vectors.T @ np.asarray(change), atol=1e-4)


def test_own_data_is_private_by_inputs_that_are_nobodys(tmp_path):
    draw, file = np.random.default_rng(0), tmp_path / "mine.npz"
    x = draw.normal(3, 2, size=(60, 3))
    np.savez(file, x=x, y=np.where(x[:, 0] > 3, "a", "b"), client=np.arange(60) % 6, x_public=x[:9] + 1)
    config = runpy.run_path(str(ROOT / "configs" / "own_data.py"))["get_config"]("private")
    config.task.file, config.fipa.privacy.delta = str(file), 1e-2
    built = experiment.build(config)
    assert built.problem.public["x"].shape == (9, 3)
    config.task.standardise = "client"
    with pytest.raises(ValueError, match=r"'client' scales by all clients' inputs or targets"):
        experiment.build(config)


@pytest.mark.slow
def test_the_phase_of_a_head_whitens_by_released_features(tmp_path):
    """The whole of `digits.py:private` by its released second moments, in two rounds."""
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]("private")
    config.fipa.rounds, config.fipa.cache_body, config.fipa.trainable = 2, True, "^Dense_0/"
    config.data.train_split = "train[:300]"
    config.compare = ("fedavg:privacy.whitening=release:local.lr=3:privacy.clip=1",)
    whole_run.run(config, tmp_path)
    rows = rows_in(tmp_path)
    assert len(rows) == 2 and rows[1]["epsilon"] == pytest.approx(8, rel=1e-3) and not rows[1]["skipped"]


@pytest.mark.slow
@OPTIONAL
def test_sampled_clients(tmp_path):
    fields = {
        "cohort": 2,
        "fipa.privacy.sampling": "poisson",
        "fipa.privacy.noise_multiplier": 2.0,
        "rounds_per_call": 2,
    }
    whole_run.run(private(compare=("fedavg",), **fields), tmp_path)
    rows = rows_in(tmp_path)
    assert len(rows) == 3 and 0 < rows[0]["epsilon"] < rows[2]["epsilon"] <= 8


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compare": ("fipa",)}, r"aggregator\.name: 'fipa' looks at single messages"),
        ({"compare": ("fedavg:late.share=0.5",)}, r"late\.share: a late client"),
        ({"compare": ("fedavg:faults.nan=0.5",)}, r"faults: nobody may see"),
        ({"compare": ("fedavg:term.name=scaffold",)}, r"term\.name: 'scaffold' keeps what single clients send"),
        ({"compare": ("centralised",)}, r"aggregator\.name|pooled"),
        ({"fipa.least_clients": 2}, r"least_clients: a skipped round would tell"),
        ({"eval.clients_every": 1}, r"eval\.clients_every: figures of the clients' own examples"),
        ({"personal.compare": ("finetune",)}, r"personal\.compare: models of single clients"),
        ({"warmup.rounds": 1}, r"privacy\.epsilon: the warm-up trains on the same clients"),
        ({"chunk": -1}, r"chunk: the seconds"),
        (
            {"task.name": "own_data", "task.examples_per_client": 50},
            r"task\.standardise: 'pooled' scales by all clients' inputs",
        ),
        (
            USUAL | {"task.name": "images", "data.name": "digits", "data.augment": False},
            r"data\.public: the channels' means of 'digits'",
        ),
        ({"cohort": 2}, r"cohort: with privacy\.sampling = 'poisson'"),
        ({"fipa.privacy.sampling": "poisson"}, r"cohort: with privacy\.sampling = 'poisson'"),
        ({"fipa.privacy.sampling": "some"}, r"privacy\.sampling"),
        *(
            ({"fipa.privacy.epsilon": 0.0, "fipa.privacy.delta": 1e-3, f"fipa.privacy.{name}": value}, f"{name}: got")
            for name, value in {"noise_multiplier": 1.0, "sampling": "poisson", "whitening": "bogus", "clip": 1}.items()
        ),
        ({"compare": ("fedavg:privacy.epsilon=0:privacy.clip=3",)}, r"config\.fipa\.privacy\.clip: got 3.0, but"),
        ({"warmup.rounds": 1, "warmup.privacy.clip": 3.0}, r"config\.warmup\.privacy\.clip: got 3.0, but without"),
        ({"compare": (f"{WHITENED}:local.weight_decay=0.1",)}, r"weight_decay: it would pull the whitened"),
        ({"compare": (f"{WHITENED}:trainable=Dense_0",)}, r"privacy\.whitening: needs trainable to name all"),
        ({"compare": ("fedavg:privacy.whitening=release",)}, r"privacy\.whitening: 'release' is of the features"),
        ({"fipa.privacy.delta": 0.2}, r"privacy\.delta: 0\.2 would allow to publish one client"),
    ],
)
def test_what_would_leak_is_refused_in_words(fields, words):
    with pytest.raises(ValueError, match=words):
        experiment.build(private(**fields))
