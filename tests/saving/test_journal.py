"""A run that was stopped goes on as if it had not been, or says why it does not."""

import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest
from helpers.runs import tiny

from fipa_jax import trees
from fipa_jax.config import fields
from fipa_jax.config.methods import method
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import state as state_lib
from fipa_jax.reporting import console as report
from fipa_jax.reporting import metrics
from fipa_jax.run import loop, phase_parts, whole_run
from fipa_jax.saving import checkpoints as checkpoint
from fipa_jax.saving import journal, resume
from fipa_jax.saving import signals as stopping
from fipa_jax.tasks.task import Task

METHODS = ("fipa:term.name=scaffold:server.optimizer=adam:server.lr=0.01", "fedavg:local.lr_decay=0.9")
EVERY_ROUND = {"seconds": 0.0, "keep": 3}


class Killed(BaseException):
    """The process ends here."""


def config_of(**fields):
    config = tiny(**{"compare": METHODS, "checkpoint": EVERY_ROUND} | fields)
    config.task.num_clients, config.cohort = 3, 2
    config.warmup.rounds, config.fipa.rounds = 2, 3
    return config


def left_by(workdir):
    """(the rows without seconds, {model file: its bytes}, the summary) of a run."""
    rows = metrics.read(workdir / "metrics.jsonl")
    plain = [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]
    models = {path.name: path.read_bytes() for path in workdir.glob("*.msgpack")}
    return plain, models, json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without pictures, and with every program from the cache: most of a tiny run is compiling and drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((whole_run, "draw_curves"), (report, "draw_split"), (report, "draw_prediction")):
            patch.setattr(module, name, lambda *_: None)
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        yield
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@pytest.fixture(scope="module")
def folder_of_whole(tmp_path_factory):
    """The work directory of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    whole_run.run(config_of(), folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder_of_whole):
    """What it leaves."""
    return left_by(folder_of_whole)


def run_until(monkeypatch, folder, rows, config=None, after=False):
    """Runs until so many rows are written in this process; it dies then, before the checkpoint or after it."""
    written = [0]
    keep, write = journal.Journal.keep, journal.Journal.write

    def counting(self, row):
        write(self, row)
        written[0] += 1

    def dying(self, *given, **named):
        if after:
            keep(self, *given, **named)
        if written[0] >= rows:
            raise Killed
        if not after:
            keep(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "write", counting)
        patch.setattr(journal.Journal, "keep", dying)
        try:
            whole_run.run(config or config_of(), folder)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_killed_again_and_again_is_the_run_in_one_go(monkeypatch, tmp_path, whole, after):
    """Rows, models and summary, to the bit: phases, stores and states of the server, of rules and of schedules."""
    for _ in range(20):
        if run_until(monkeypatch, tmp_path, 2, after=after):
            break
    else:
        pytest.fail("it never ended")
    assert left_by(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"rounds_per_call": 2}, marks=pytest.mark.slow),
        {"stage_seconds": False},
        pytest.param({"client_store": "host"}, marks=pytest.mark.slow),
        pytest.param({"examples_on": "host"}, marks=pytest.mark.slow),
        pytest.param({"compare": ("fipa_memory:late.share=0.5:late.most=2",)}, marks=pytest.mark.slow),
        pytest.param(
            {"compare": ("fipa:aggregator.past.kind=targets:aggregator.past.length=2",), "rounds_per_call": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param({"compare": ("fipa:aggregator.past.kind=latest:aggregator.past.rank=3",)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_however_rounds_are_run(monkeypatch, tmp_path, fields):
    config = config_of(**fields)
    config.eval.every = 2
    for folder, rows in (("whole", 99), ("parts", 4)):
        while not run_until(monkeypatch, tmp_path / folder, rows, config):
            pass
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")


@pytest.mark.slow
def test_rows_after_the_checkpoint_are_written_once(monkeypatch, tmp_path, whole):
    """A run that dies between a row and its checkpoint, in the middle of a line even, has each row once in the end.

    What is left of a file that it was writing is gone, too.
    """
    run_until(monkeypatch, tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"run": "fipa", "rou')
    (tmp_path / "summary.json.0123abcd.partial").write_text('{"runs": {"war')
    whole_run.run(config_of(), tmp_path)
    assert left_by(tmp_path) == whole and not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_step_ahead_of_its_rows_is_passed_over(monkeypatch, tmp_path, whole, caplog):
    run_until(monkeypatch, tmp_path, 4, after=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
    whole_run.run(config_of(), tmp_path)
    assert "follows on" in caplog.text
    assert left_by(tmp_path) == whole


def test_a_damaged_step_is_passed_over(monkeypatch, tmp_path, whole, caplog):
    run_until(monkeypatch, tmp_path, 4, after=True)
    target = next(
        path for path in (tmp_path / "checkpoints/4").rglob("*") if path.is_file() and path.stat().st_size > 99
    )
    content = bytearray(target.read_bytes())
    content[50] ^= 4
    target.write_bytes(content)
    whole_run.run(config_of(), tmp_path)
    assert "checkpoints/4 is damaged" in caplog.text and (tmp_path / "broken/4").is_dir()
    assert left_by(tmp_path) == whole


@pytest.mark.slow
def test_a_refused_run_leaves_no_trace(monkeypatch, tmp_path, whole):
    """The original command goes on, whatever was tried in between."""
    run_until(monkeypatch, tmp_path, 3, after=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for change, words in (
        ({"model.widths": (4,)}, r"--resume: the checkpoint is not of a run with this config: .*Dense_0"),
        ({"warmup.rounds": 1}, r"--resume: the run's fipa.* began with round 2, and would now with 1"),
        ({"compare": ("fedavg",)}, r"--resume: the run was stopped in 'fipa.*', which config\.compare has no more"),
    ):
        other = config_of()
        other.update_from_flattened_dict(change)
        with pytest.raises(ValueError, match=words):
            whole_run.run(other, tmp_path, resume="anyway")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    whole_run.run(config_of(), tmp_path)
    assert left_by(tmp_path) == whole


def test_two_runs_do_not_share_a_work_directory(monkeypatch, tmp_path):
    run_phase = loop.run_phase

    def meanwhile(*given):
        for how in resume.RESUMES:
            with pytest.raises(ValueError, match="a run is under way in"):
                whole_run.run(config_of(), tmp_path, resume=how)
        return run_phase(*given)

    monkeypatch.setattr(loop, "run_phase", meanwhile)
    config = config_of(compare=("fedavg",))
    config.warmup.rounds = 0
    whole_run.run(config, tmp_path)
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3 and not (tmp_path / "lock").exists()


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_rounds(tmp_path, caplog):
    config = config_of(compare=("fedavg",))
    whole_run.run(config, tmp_path / "parts")
    config.fipa.rounds = 5
    caplog.clear()
    whole_run.run(config, tmp_path / "parts", resume="anyway")
    assert "going on after round 4 of fedavg" in caplog.text
    whole_run.run(config, tmp_path / "whole")
    assert left_by(tmp_path / "parts") == left_by(tmp_path / "whole")


def test_a_saved_model_goes_on_as_the_run_did(tmp_path, folder_of_whole, whole):
    """The methods from the warm-up's saved model are to the bit those of the run in one go."""
    config = config_of(init_from=str(folder_of_whole / "warmup.msgpack"), first_round=2)
    config.warmup.rounds = 0
    whole_run.run(config, tmp_path)
    rows, models, _ = left_by(tmp_path)
    assert rows == [row for row in whole[0] if row["run"] != "warmup"] and len(rows) == 3 * len(METHODS)
    assert models == {name: model for name, model in whole[1].items() if name != "warmup.msgpack"}


def test_methods_that_join_or_change_places_run_once(tmp_path):
    """In a run that goes on with another `compare`: none is passed over, and none runs twice."""
    first, second, third = "fedavg", "fedavg:local.lr=0.2", "fedavg:local.lr=0.3"
    whole_run.run(config_of(compare=(first, second)), tmp_path)
    summary = whole_run.run(config_of(compare=(third, second, first)), tmp_path, resume="anyway")
    rows = [(row["run"], row["round"]) for row in metrics.read(tmp_path / "metrics.jsonl") if row["run"] != "warmup"]
    assert rows == [(name, k) for name in (first, second, third) for k in (2, 3, 4)]
    assert list(summary["runs"]) == [third, second, first]


@pytest.mark.parametrize(
    ("spec", "most"),
    [("fedavg:rounds=4", 0), pytest.param("fedavg", 200.0, marks=pytest.mark.slow)],
    ids=["long", "bytes"],
)
def test_a_run_is_finished_after_its_last_methods_last_round(tmp_path, spec, most):
    """However many it has of its own, and where the bytes are spent: the next run moves it aside without being told."""
    config = config_of(compare=("fedavg:local.lr=0.2", spec))
    config.warmup.rounds, config.fipa.most_bytes_up = 0, most
    whole_run.run(config, tmp_path)
    assert metrics.read(tmp_path / "metrics.jsonl")[-1]["round"] != 2, "the last one is not that of `fipa.rounds`"
    config.seed = 1
    whole_run.run(config, tmp_path)
    assert (tmp_path / "previous-1").is_dir()


def test_who_runs_one_phase_alone_need_not_say_which_is_the_last(tmp_path):
    """As a federation's server does."""
    for rounds, last in ((3, "fedavg:server.lr=0.5"), (0, "warmup")):
        config = config_of(compare=("fedavg", "fedavg:server.lr=0.5"))
        config.fipa.rounds = rounds
        with resume.open_at(tmp_path / last[:4], config, {"data": {}, "code": {}}) as journal:
            assert journal.last_phase == last and not journal.done


@pytest.mark.parametrize("damage", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("first", "cut")), "last"])
def test_rows_that_cannot_be_read_are_an_error_before_the_first_round(monkeypatch, tmp_path, damage):
    """It names the file, the line and a way out."""
    run_until(monkeypatch, tmp_path, 3, after=True)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    place = {"first": 0, "last": len(lines) - 1}.get(damage, 0)
    lines[place] = b"XX" + lines[place][2:]
    file.write_bytes(b"".join(lines) if damage != "cut" else file.read_bytes()[:40])
    monkeypatch.setattr(loop, "run_phase", lambda *_: pytest.fail("a round has begun"))
    words = "which has only 40" if damage == "cut" else f"line {place + 1} is no row of metrics"
    with pytest.raises(ValueError, match=rf"(?s)metrics\.jsonl.*{words}.*--resume=no"):
        whole_run.run(config_of(), tmp_path)


def test_a_finished_run_is_told_again(tmp_path, whole, caplog):
    for _ in range(2):
        summary = whole_run.run(config_of(), tmp_path)
    assert "is finished; --resume=no runs it anew" in caplog.text
    assert left_by(tmp_path) == whole and list(summary["runs"]) == list(METHODS)


def test_a_stopped_run_of_another_origin_is_refused_field_by_field(monkeypatch, tmp_path, caplog):
    run_until(monkeypatch, tmp_path, 3, after=True)
    before = sorted(tmp_path.rglob("*"))
    other = config_of(devices=2)
    other.fipa.local.lr, other.task.examples_per_client = 0.2, 9
    monkeypatch.setattr(whole_run.provenance, "of_code", lambda: {"source": "0123", "jax": "9.9"})
    with pytest.raises(ValueError, match="holds an unfinished run of another origin") as raised:
        whole_run.run(other, tmp_path)
    said = str(raised.value)
    for words in (
        "config.fipa.local.lr: 0.1 there, 0.2 here",
        "config.task.examples_per_client: 8 there, 9 here",
        "data.train/x: 'float32[24, 1] ",
        "code.jax: '0.",
        "--resume=anyway",
        "--resume=no",
    ):
        assert words in said
    assert "devices" not in said, "the number of devices changes nothing"
    assert sorted(tmp_path.rglob("*")) == before, "nothing is moved"

    monkeypatch.undo()
    other = config_of()
    other.fipa.local.lr = 0.2
    whole_run.run(other, tmp_path, resume="anyway")
    assert "going on with a run of another origin:\n  config.fipa.local.lr: 0.1 there, 0.2 here" in caplog.text
    rows, *_ = left_by(tmp_path)
    assert [(row["run"], row["round"]) for row in rows] == [
        *(("warmup", k) for k in (0, 1)),
        *((method, k) for method in METHODS for k in (2, 3, 4)),
    ]


@pytest.mark.slow
def test_fewer_rounds_than_are_done_are_named(monkeypatch, tmp_path, caplog):
    """The method that was stopped has more than those after it get."""
    run_until(monkeypatch, tmp_path, 4, after=True)
    monkeypatch.undo()
    other = config_of()
    other.fipa.rounds = 1
    whole_run.run(other, tmp_path, resume="anyway")
    assert f"{METHODS[0]}: has 2 rounds, more than the 1 that are asked for now" in caplog.text


class InMemory:
    """Checkpoints of which the last one is at hand."""

    named, check, wait = dict, lambda self: None, lambda self: None

    def save(self, step, tree, note, names):
        self.saved = checkpoint.Saved(step, trees.paths(tree), note)


def test_rounds_that_run_ahead_are_looked_at_where_a_checkpoint_is_due(tmp_path):
    config = tiny()
    for seconds, wanted in ((0, True), (1e6, False)):
        config.checkpoint.seconds = seconds
        kept = InMemory()
        book = journal.Journal(tmp_path, config.checkpoint, kept, None, {"config": {}}, stopping.Signals())
        assert book.asked() == wanted
        book.close()


@pytest.mark.parametrize("spec", ["fipa", "fipa:sketch.budget=1e3", "fisher_diagonal", "fedpm", "fipa_sums"])
def test_a_rules_number_that_the_config_changes_acts_in_the_run_that_goes_on(tmp_path, spec):
    """One that the rule has moved by itself stays, if the config has it as it was."""
    config, kept = tiny(), InMemory()

    def going_on(saved, **changes):
        settings = method(config, spec)
        settings.aggregator.update(changes)
        parts = phase_parts.make_parts(config, settings, Task(*[None] * 4), 2)
        book = journal.Journal(tmp_path, config.checkpoint, kept, saved, {"config": {}}, stopping.Signals())
        state, _ = book.resumed("fipa", parts_lib.init(parts, {"a": jnp.zeros([3, 2])}), parts)
        return book, state, state_lib.numbers_of(state.aggregator, ("damping",))

    book, state, (path,) = going_on(None)
    moved = trees.replace(state.aggregator, {path: jnp.float32(5)})
    book.keep("fipa", state._replace(aggregator=moved), {"round": 0}, {"first": 0}, ended=True)
    book.close()
    for changes, wanted in (({}, 5), ({"damping": 0.25}, 0.25)):
        book, _, numbers = going_on(kept.saved, **changes)
        book.close()
        assert numbers == {path: wanted}


@pytest.mark.parametrize(
    "spec", ["fipa", "fipa_auto", "fipa:aggregator.trust=True", "fipa_few_bytes", "fipa_span", "fedpm"]
)
def test_each_of_a_rules_numbers_is_that_of_the_config_it_goes_on_with(tmp_path, spec):
    """Whatever the rule: its damping, its limits, what it remembers; and those that stay the same are as they were."""
    config, kept = tiny(), InMemory()

    def parts_of(changes):
        settings = method(config, spec)
        for name, value in changes.items():
            group, field = fields.find(settings, f"aggregator.{name}")
            group[field] = value
        return phase_parts.make_parts(config, settings, Task(*[None] * 4), 2)

    def going_on(saved, changes):
        parts = parts_of(changes)
        book = journal.Journal(tmp_path, config.checkpoint, kept, saved, {"config": {}}, stopping.Signals())
        state, _ = book.resumed("fipa", parts_lib.init(parts, {"a": jnp.zeros([3, 2])}), parts)
        return book, state, state_lib.numbers_of(state.aggregator, parts.aggregator.hyper)

    book, state, before = going_on(None, {})
    book.keep("fipa", state, {"round": 0}, {"first": 0}, ended=True)
    book.close()
    names = parts_of({}).aggregator.hyper
    assert names and len(before) >= len(names)
    for name in names:
        book, _, numbers = going_on(kept.saved, {name: 0.0625})
        book.close()
        changed = {path for path, number in numbers.items() if number != before[path]}
        assert changed and all(numbers[path] == 0.0625 for path in changed), name
        assert all(path.endswith(name) for path in changed), "the others stay"


@pytest.mark.slow
def test_a_run_is_moved_aside_where_it_cannot_go_on_or_is_told_to(monkeypatch, tmp_path, whole):
    run_until(monkeypatch, tmp_path, 1)  # before its first checkpoint
    run_until(monkeypatch, tmp_path, 99)
    assert left_by(tmp_path) == whole and len(metrics.read(tmp_path / "previous-1/metrics.jsonl")) == 1
    other = config_of(seed=1)
    whole_run.run(other, tmp_path)  # that run is finished
    assert left_by(tmp_path / "previous-2") == whole
    whole_run.run(other, tmp_path, resume="no")
    assert left_by(tmp_path / "previous-3") == left_by(tmp_path)


def test_damage_to_all_steps_is_an_error(monkeypatch, tmp_path):
    run_until(monkeypatch, tmp_path, 3, after=True)
    for seal in tmp_path.glob(f"checkpoints/*/{checkpoint.SEAL}"):
        seal.write_text("altered")
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(ValueError, match="no checkpoint can be used"):
            whole_run.run(config_of(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_best_round_and_the_warm_ups_end_are_kept(tmp_path):
    config = config_of()
    config.fipa.rounds, config.checkpoint.keep = 6, 1
    whole_run.run(config, tmp_path)
    steps = {name: int(step.name) for name, step in checkpoint.named(tmp_path / "checkpoints").items()}
    rows = metrics.read(tmp_path / "metrics.jsonl")
    wanted = {"end of warmup": 2}
    for name in ("warmup", *METHODS):
        own = [(row["test_mse"], number) for number, row in enumerate(rows, 1) if row["run"] == name]
        wanted[f"best of {name}"] = min(own)[1]
    assert steps == wanted


@pytest.mark.parametrize("fields", [{"rounds_per_call": 2}, {"stage_seconds": False}], ids=str)
def test_calls_end_with_rounds_that_are_evaluated(tmp_path, fields):
    """So that they may be the best."""
    config = config_of(compare=("fedavg",), **fields)
    config.warmup.rounds, config.fipa.rounds, config.eval.every = 0, 6, 2
    whole_run.run(config, tmp_path)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    evaluated = [(row["test_mse"], number) for number, row in enumerate(rows, 1) if "test_mse" in row]
    assert int(checkpoint.named(tmp_path / "checkpoints")["best of fedavg"].name) == min(evaluated)[1]
    many = tiny(rounds_per_call=5)
    many.eval.every = 3
    assert [loop.count_to(many, k) for k in range(6)] == [4, 3, 5, 4, 3, 5]
    many.rounds_per_call, many.eval.every = 2, 10
    assert [loop.count_to(many, k) for k in (0, 1, 9, 10)] == [1, 2, 2, 1]
    unwatched = tiny(stage_seconds=False)
    unwatched.eval.every = 3
    assert [loop.count_to(unwatched, k) for k in range(4)] == [1, 3, 2, 1]
    assert loop.count_to(tiny(), 1) == 1


@pytest.mark.parametrize(
    ("row", "score"),
    [
        ({"test_loss": 2.0, "test_accuracy": 0.5}, 0.5),
        ({"test_accuracy": 0.5, "holdout_loss": 2.0}, -2.0),
        ({"test_mse": None, "client_mse_mean": 1.0}, None),
    ],
)
def test_the_figure_by_which_a_round_is_the_best(row, score):
    assert journal.score_of(row) == score


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fields", [pytest.param({}, marks=pytest.mark.slow), {"stage_seconds": False}], ids=["timed", "unwatched"]
)
def test_a_signal_ends_the_run_after_its_round_and_nothing_is_lost(monkeypatch, tmp_path, whole, number, fields):
    """Though no checkpoint is due, and though the host would look at nothing for many rounds."""
    config = config_of(**fields)
    config.checkpoint.seconds, config.eval.every = 1e9, 1 if not fields else 100
    due, seen = loop.due, []

    def signalling(every, k, last):
        seen.append(k)
        if k == 3:
            os.kill(os.getpid(), number)
            threading.Event().wait(0.2)
        return due(every, k, last)

    monkeypatch.setattr(loop, "due", signalling)
    with pytest.raises(stopping.Stopped, match=r"stopped by SIG.* after round 3 of fipa") as raised:
        whole_run.run(config, tmp_path)
    assert raised.value.number == number and seen[-1] == 3
    monkeypatch.undo()
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 4
    whole_run.run(config, tmp_path)
    if not fields:
        assert left_by(tmp_path)[:2] == whole[:2]
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 8


def test_handlers_are_the_users_again_after_the_run():
    before = [signal.getsignal(number) for number in stopping.NUMBERS]
    with stopping.Signals() as signals:
        assert [signal.getsignal(number) for number in stopping.NUMBERS] != before
    assert [signal.getsignal(number) for number in stopping.NUMBERS] == before
    assert signals.asked == 0 and "signals" not in {
        thread.name for thread in threading.enumerate() if thread.is_alive()
    }


def test_signals_are_left_alone_outside_the_main_thread():
    def enter():
        with stopping.Signals() as signals:
            found.append(signals.asked)

    found = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.parametrize(
    ("how", "words"), [("no", "the same command without --resume=no"), ("yes", "the same command")]
)
def test_a_run_knows_what_goes_on_with_it(tmp_path, how, words):
    """Given again, --resume=no would move it aside."""
    with resume.open_at(tmp_path, tiny(), {}, how) as book:
        assert book.again == words
