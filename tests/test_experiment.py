"""Whole runs in this process: what does not depend on the plan of execution, and what is never lost."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax import aggregate, checkpoint, experiment, metrics
from fipa_jax import config as config_lib


def tiny(**fields):
    config = config_lib.default()
    config.task.examples_per_client = 8
    config.model.widths = (3,)
    config.fipa.rounds = 2
    config.fipa.sketch.rank = 3
    config.eval.batch_size = 1000
    config.update(fields)
    return config


def figures(workdir):
    """The rows without the seconds."""
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def test_the_number_of_devices_changes_nothing(tmp_path):
    for devices in (1, 2):
        experiment.run(tiny(devices=devices), tmp_path / str(devices))
    assert figures(tmp_path / "1") == figures(tmp_path / "2")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"--workdir: .* holds 'thesis\.tex'"):
        experiment.run(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_rules_share_a_program_only_where_their_numbers_are_traced(tmp_path, monkeypatch):
    """A rule that closes over a number is compiled for each of its values; FIPA keeps its numbers in its state."""

    def scaled(max_step):
        mean = aggregate.mean()

        def apply(uploads, state, params):
            step, state, info = mean.apply(uploads, state, params)
            return {path: max_step * leaf for path, leaf in step.items()}, state, info

        return mean._replace(apply=apply)

    monkeypatch.setitem(aggregate.AGGREGATORS, "scaled", scaled)
    config = tiny(compare=("fipa:aggregator.name=scaled:aggregator.max_step=0", "fipa:aggregator.name=scaled"))
    still, moved = experiment.run(config, tmp_path)["runs"].values()
    assert still["final"] != moved["final"]

    fipa = experiment.build(tiny(compare=("fipa", "fipa:aggregator.damping=0.5", "fipa:aggregator.max_step=1")))
    assert len(fipa.compiled) == 1


def test_parameters_may_be_any_pytree(tmp_path):
    params = ({"w": jnp.arange(3.0)}, [jnp.ones((2, 2)), jnp.zeros(())])
    checkpoint.save_model(tmp_path / "model.msgpack", params)
    found = checkpoint.load_model(tmp_path / "model.msgpack", params)
    assert isinstance(found, tuple) and isinstance(found[1], list)
    np.testing.assert_array_equal(found[0]["w"], params[0]["w"])


def test_double_precision_outside_its_scope_is_an_error():
    with pytest.raises(ValueError, match=r"config\.precision: float64 needs"):
        experiment.build(tiny(precision="float64"))


def test_a_phase_on_cached_features_is_the_same_phase(tmp_path):
    """Rule by rule, to rounding; and the other rules of the run, on the whole network, go on as before."""
    head = "trainable=^Dense_1/:sketch.solver"
    specs = [
        f"fipa:{head}=head",
        f"fipa:{head}=head:cache_body=true",
        "fedavg",
        "fedavg:trainable=^Dense_1/:cache_body=true",
    ]
    config = tiny(compare=tuple(specs), precision="float64")
    config.warmup.rounds = 1
    runs = experiment.run(config, tmp_path)["runs"]
    plain, cached = (runs[spec]["final"] for spec in specs[:2])
    assert plain != runs["fedavg"]["final"]
    for name, value in plain.items():
        np.testing.assert_allclose(cached[name], value, rtol=1e-9, err_msg=name)
    with jax.enable_x64(True):
        like = experiment.build(config).params
        files = tmp_path / "warmup.msgpack", *tmp_path.glob("fedavg*cache_body*.msgpack")
        before, after = (checkpoint.load_model(file, like) for file in files)
    chex.assert_trees_all_equal(before["Dense_0"], after["Dense_0"])
    assert not np.array_equal(before["Dense_1"]["kernel"], after["Dense_1"]["kernel"])


@pytest.mark.parametrize("trainable", [".*", "Dense_0/"])
def test_features_are_cached_for_the_head_alone(trainable):
    config = tiny()
    config.fipa.cache_body, config.fipa.trainable = True, trainable
    with pytest.raises(
        ValueError, match=r"cache_body needs config\.fipa\.trainable .*Dense_1.* selects 'Dense_0/bias'"
    ):
        experiment.build(config)


def test_every_term_learns_under_every_rule(tmp_path):
    """Those that need neither labels nor the features of a network; every file of the run is that of one pair."""
    pairs = [f"{rule}:term.name={term}" for rule in ("fedavg", "fipa", "fisher_diagonal") for term in ("dyn", "prox")]
    config = tiny(compare=tuple(pairs))
    config.fipa.rounds, config.fipa.term.mu, config.fipa.local.lr = 6, 0.1, 0.05
    experiment.run(config, tmp_path)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    for pair in pairs:
        losses = [row["test_mse"] for row in rows if row["run"] == pair]
        assert losses[-1] < losses[0], pair
