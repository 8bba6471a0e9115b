"""The server that any transport can call: the rounds of a simulation; and what does not fit is an absent client.

The clients' programs, the wire and the server's reading are all in between; what a simulation gives is the oracle.
"""

import functools

import jax
import numpy as np
import pytest
from helpers.deployed import Deployed, bits, config_of, gap

from fipa_jax import trees
from fipa_jax.aggregate import row_blocks
from fipa_jax.deployment import agreement, flower, wire
from fipa_jax.deployment.agreement import agree
from fipa_jax.deployment.server import Server, opened
from fipa_jax.deployment.site import Site
from fipa_jax.reporting import metrics
from fipa_jax.run.loop import Stalled
from fipa_jax.saving.journal import Rows

OF_SPAN = "aggregator.span.columns=6:aggregator.span.fresh=2:aggregator.span.bits=0"
FEW_BITS = "fipa_span:aggregator.span.columns=6:aggregator.span.fresh=2:aggregator.span.bits=3:sketch.share=0.4"
TOP_K = "fedavg:local.compress.name=top_k:local.compress.share=0.2:term.name=feedback"
MOON = "fedavg:term.name=moon:term.mu=1:local.steps=2"
KEPT = f"fipa_span:{OF_SPAN}:sketch.bits=0:local.compress.name=none:term.name=varp"
KINDS = {
    "mean": ("fedavg", {}),
    "fipa": ("fipa", {}),
    "prior": ("fipa:aggregator.past.kind=prior:aggregator.relative=False", {}),
    "latest": ("fipa:aggregator.past.kind=latest:aggregator.relative=False", {}),
    "lev_marquardt": ("fipa", {"lev_marquardt": True}),
    "diagonal": ("fisher_diagonal", {}),
    "sums": ("fipa_sums:aggregator.sums.columns=6:aggregator.sums.fresh=2", {}),
    "sums_of_gradients": ("fipa_sums_of_gradients:aggregator.sums.columns=6:aggregator.sums.fresh=2", {}),
    "span": (f"fipa_span:{OF_SPAN}:sketch.bits=0:local.compress.name=none", {}),
    "span_in_few_bits": (FEW_BITS, {"clients": 5, "fipa": {"rounds": 4}}),
    "few_bytes": ("fipa_few_bytes:sketch.rank=2:sketch.share=0.5:local.compress.name=few_bits", {}),
    "budget": ("fipa_few_bytes:sketch.rank=3:sketch.bits=0:sketch.budget=250", {"fipa": {"rounds": 6}}),
    "averages_in_few_bits": ("fedavg:local.compress.name=few_bits:local.compress.bits=5", {}),
    "bfloat16": ("fipa:sketch.store=bfloat16", {}),
    "varp": ("fedavg:term.name=varp:server.lr=0.5", {"clients": 5, "cohort": 2, "fipa": {"rounds": 5}}),
    "kept_gradients": (KEPT, {"clients": 5, "cohort": 2, "fipa": {"rounds": 5}}),
    "mifa": ("fedavg:term.name=mifa", {"clients": 5, "cohort": 2, "fipa": {"rounds": 5}}),
    "moon": (MOON, {"clients": 5, "cohort": 3, "fipa": {"rounds": 5}}),
    "top_k": (TOP_K, {"clients": 5, "cohort": 3, "fipa": {"rounds": 5}}),
    "cohort": ("fipa", {"clients": 5, "cohort": 2}),
    "kfac": ("fedfisher_kfac:aggregator.damping=0.1:aggregator.past.kind=prior", {}),
    "linked": ("fipa:sketch.rank=5:sketch.link=0.008:sketch.deadline=0.21", {}),
    "averaged": ("fedavg:server.average=0.5", {}),
    "posterior": ("fedivon:aggregator.posterior.start=10", {}),
}
IN_FEW_BITS = ("span_in_few_bits", "few_bytes", "averages_in_few_bits")
LAYERS = "fedpm:aggregator.damping=1:local.steps=2"


@pytest.fixture(scope="module")
def federation():
    """Three clients of different size, and a trust region: sketch, loss and damping all travel."""
    return Deployed(config_of(lev_marquardt=True))


def compare(federation, bound):
    got, rows = federation.run()
    want, expected = federation.simulate()
    assert gap(got, want) <= bound, (got, want)
    for row, other in zip(rows, expected, strict=True):
        shared = [name for name in row if name in other and not name.startswith(("run", "seconds", "bytes"))]
        assert "local_loss" in shared
        for name in shared:
            np.testing.assert_allclose(row[name], other[name], rtol=1e4 * bound, atol=1e4 * bound, err_msg=name)


def test_a_round_over_the_wire_is_that_of_a_simulation(federation):
    server = federation.server()
    while not server.done:
        server.round(federation.answers(server))
        assert not server.wrong
    want = federation.whole_rounds()
    assert gap(server.params, want.params) <= 1e-12
    assert gap(server._state.aggregator, want.aggregator) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_over_the_wire_is_that_of_a_simulation(kind, precision, bound):
    spec, fields = KINDS[kind]
    if kind in ("few_bytes", "top_k"):  # scales of a basis, which is made of length one, and entries: float32 there
        bound = max(bound, 1e-6)
    if kind in IN_FEW_BITS and precision == "float32":
        pytest.skip("what is rounded at random turns on a float32's last digit, in which two programs differ")
    compare(Deployed(config_of(precision, **fields), spec), bound)


def test_layer_factors_over_the_wire_are_those_of_a_simulation():
    """Halves of the layers' input factors come in as they were sent, and what lacks one is nobody's."""
    layers = Deployed(config_of(), LAYERS)
    server, state = layers.server(), layers.whole_rounds()
    while not server.done:
        sent = layers.answers(server)
        server.round(sent)
        assert not server.wrong
    assert gap(server.params, state.params) <= 1e-12
    arrays = wire.unpack(sent[0]).arrays
    halves = {name: array.shape for name, array in arrays.items() if name.startswith("layers/")}
    widths = {path: leaf.shape[0] + 1 for path, leaf in trees.paths(state.params).items() if path.endswith("kernel")}
    assert halves == {f"layers/inputs/{path}": (side * (side + 1) // 2,) for path, side in widths.items()}
    again = layers.server()
    again.round(
        layers.answers(again) | {1: changed(layers.answers(again)[1], remove=("layers/inputs/Dense_0/kernel",))}
    )
    assert "sent nothing of the kind" in again.wrong[1]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["fipa", "fipa:aggregator.past.kind=prior:aggregator.relative=False"])
def test_a_model_whose_rows_are_spread_over_devices_travels_with_its_own_rows_alone(spec):
    """From 65,536 parameters on the server fills bases up for its devices; over the wire they have P rows."""
    large = Deployed(config_of(model={"widths": (256, 256)}), spec)
    size = sum(leaf.size for leaf in jax.tree.leaves(large.agreement.params))
    assert size >= row_blocks.SPREAD_FROM and row_blocks.padded(size) > size
    sent = wire.unpack(large.answers(large.server(), [0])[0]).arrays
    assert sent["sketch/basis"].shape == (size, 3)
    compare(large, 1e-12)


@pytest.fixture(scope="module")
def uploads(federation):
    """What the three clients answer to the first broadcast."""
    return federation.answers(federation.server())


def after(federation, sent):
    """(the state's bits after a round, who is wrong)."""
    server = federation.server()
    server.round(sent)
    return bits(server._state), server.wrong


@pytest.fixture(scope="module")
def without_the_second(federation, uploads):
    """The state's bits after a round in which client 1 is absent, and after one with all."""
    absent, wrong = after(federation, {client: uploads[client] for client in (0, 2)})
    assert not wrong
    whole, wrong = after(federation, uploads)
    assert not wrong and whole != absent
    return absent


def changed(blob, remove=(), **arrays):
    """An upload with other arrays, its digest right; a name's `/` is written `__`."""
    message = wire.unpack(blob)
    new = message.arrays | {name.replace("__", "/"): array for name, array in arrays.items()}
    return wire.pack(message._replace(arrays={name: new[name] for name in new if name not in remove}))


def about(blob, **fields):
    """An upload that says something else about itself."""
    return wire.pack(wire.unpack(blob)._replace(**fields))


def faults(blob, other):
    """{what is wrong with an upload of client 1: (its bytes, what the server says)}."""
    arrays = wire.unpack(blob).arrays
    path = next(name for name in arrays if name.startswith("delta/") and len(arrays[name]) > 1)
    basis = arrays["sketch/basis"]
    return {
        "silent": (None, "it has not answered"),
        "cut": (blob[:-9], "its arrays have"),
        "a turned bit": (blob[:-1] + bytes([blob[-1] ^ 1]), "SHA-256"),
        "no bytes": (b"", "bytes"),
        "of another client": (other, "it says that it is client 0"),
        "of an earlier round": (about(blob, round=-1), "it answers round -1"),
        "of a round to come": (about(blob, round=1), "it answers round 1"),
        "another model": (about(blob, fingerprint="0" * 64), "other parameters, or of another config"),
        "a broadcast": (about(blob, kind="broadcast"), "needed upload"),
        "another rank": (changed(blob, sketch__rank=np.array(9, np.int32)), "of rank 9, asked for 3"),
        "more pairs than asked for": (
            changed(
                blob,
                sketch__eigenvalues=np.ones(4),
                sketch__basis=np.ones([len(basis), 4]),
                sketch__report__residuals=np.ones(4),
            ),
            "asked for \\[3\\] at most",
        ),
        "another shape": (changed(blob, **{path: arrays[path][:1]}), "asked for float64"),
        "another type": (changed(blob, **{path: arrays[path].astype(np.float32)}), "sent float32"),
        "something missing": (changed(blob, remove=(path,)), "sent nothing of the kind"),
        "something more": (changed(blob, more=np.ones(2)), "asked for nothing of the kind"),
        "an update of NaN": (changed(blob, **{path: arrays[path] * np.nan}), None),
        "a basis of NaN": (changed(blob, sketch__basis=basis * np.nan), None),
        "a doubled column": (changed(blob, sketch__basis=basis[:, [0] * basis.shape[1]]), None),
        "negative curvature": (changed(blob, sketch__eigenvalues=-arrays["sketch/eigenvalues"]), None),
        "a loss of NaN": (changed(blob, loss=np.array(np.nan)), None),
        "fewer than no examples": (changed(blob, num_examples=np.array(-4, np.int32)), None),
        "no examples": (changed(blob, num_examples=np.array(0, np.int32)), None),
    }


def test_every_fault_is_the_clients_absence_to_the_bit(federation, uploads, without_the_second):
    for fault, (blob, words) in faults(uploads[1], uploads[0]).items():
        state, wrong = after(federation, {**uploads, 1: blob})
        assert state == without_the_second, fault
        if words is None:  # the screening's, not the reader's
            assert not wrong, fault
        else:
            assert set(wrong) == {1}, fault
            with pytest.raises(ValueError, match=words):
                raise ValueError(wrong[1])


def test_clients_may_come_in_any_order_and_strangers_count_for_nothing(federation, uploads):
    whole, _ = after(federation, uploads)
    assert after(federation, dict(reversed(uploads.items())))[0] == whole
    absent, _ = after(federation, {client: uploads[client] for client in (0, 2)})
    state, wrong = after(federation, {0: uploads[0], 2: uploads[2], 7: about(uploads[1], client=7)})
    assert state == absent and "none of the 3 clients" in wrong[7]
    server = federation.server()
    for sent, words in (
        ({**uploads, 7: None}, "at most 3 clients, got 4"),
        ({"0": uploads[0]}, r"integers, got \['0'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            server.round(sent)
    assert server.number == 0
    state, wrong = after(federation, {0: uploads[0], 1: 12, 2: uploads[2]})
    assert state == absent and wrong == {1: "needed bytes, got int"}


def test_a_round_of_nobody_changes_nothing_but_its_number(federation):
    server = federation.server()
    before = bits(server.params)
    info = server.round({})
    assert info["skipped"] and server.number == 1 and bits(server.params) == before


def test_rounds_that_nobody_answers_end_the_run_in_the_end(federation):
    most = federation.agreement.max_skips
    server = Server(federation.agreement._replace(rounds=2 * most))
    with pytest.raises(Stalled, match=f"{most} rounds in a row were skipped"):
        while True:
            server.round({0: None})
    assert server.number == most


def test_clients_are_drawn_of_those_that_can_be_reached(federation):
    server = federation.server()
    assert server.draw() == [0, 1, 2] and server.draw(among=[2, 0]) == [0, 2] and server.draw(among=[]) == []


def test_a_broadcast_of_others_is_refused_at_the_client(federation, uploads):
    site, blob = federation.sites[0], federation.server().broadcast()
    for other in (uploads[0], about(blob, fingerprint="0" * 64), changed(blob, remove=("params/Dense_0/bias",))):
        with pytest.raises(wire.Malformed):
            site.work(other)


def test_sites_say_what_is_wrong_with_them(federation):
    with pytest.raises(ValueError, match="client: needed 0 to 2, got 3"):
        Site(federation.agreement, 3, federation.data(0))
    with pytest.raises(ValueError, match="as many examples in each field"):
        Site(federation.agreement, 0, {"x": np.zeros([2, 1]), "y": np.zeros([3, 1])})
    for data, words in (
        ({"x": np.zeros([2, 1])}, "needed a field 'y'"),
        ({"x": np.zeros([2, 1]), "y": np.zeros(2)}, r"shape \('N', 1\) in 'y', .* got float64 of \(2,\)"),
        ({"x": np.zeros([2, 3]), "y": np.zeros([2, 1])}, r"in 'x', .* got float64 of \(2, 3\)"),
        ({"x": np.zeros([2, 1]), "y": np.zeros([2, 1], int)}, "in 'y', .* got int64"),
    ):
        with pytest.raises(ValueError, match=words):
            Site(federation.agreement, 0, data)


def test_a_warm_site_answers_as_a_cold_one(federation, uploads):
    site = Site(federation.agreement, 1, federation.data(1), federation.width)
    site.warm_up()
    assert site.work(federation.server().broadcast()) == uploads[1]


def test_a_killed_server_goes_on_from_its_last_round(federation, tmp_path):
    want, rows = federation.run()
    with opened(federation.agreement, federation.config, tmp_path) as server:
        server.round(federation.answers(server))
        server._journal._checkpoints.wait()  # what a kill finds on the disk
        first = metrics.read(tmp_path / "metrics.jsonl")
    with opened(federation.agreement, federation.config, tmp_path) as server:
        assert server.number == 1 and not server.done
        server.round(federation.answers(server))
        assert server.done and bits(server.params) == bits(want)
    assert metrics.read(tmp_path / "metrics.jsonl")[:1] == first and (tmp_path / "fipa.msgpack").exists()
    seen = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in some] for some in (rows, server_rows(tmp_path))
    ]
    assert seen[0] == seen[1]


def server_rows(folder):
    return metrics.read(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("fipa.late.share", 0.5, "config.fipa.late.share"),
        ("fipa.faults.nan", 0.5, "config.fipa.faults"),
        ("fipa.term.name", "scaffold", "config.fipa.term.name"),
        ("fipa.local.compress.name", "change", "config.fipa.local.compress.name: 'change' needs what a client sent"),
        ("fipa.sketch.gradient_scale", 1.0, "config.fipa.sketch.gradient_scale"),
        ("warmup.rounds", 1, "config.warmup.rounds"),
        ("personal.compare", ("global",), "config.personal.compare"),
        ("fipa.privacy.epsilon", 1.0, "config.fipa.privacy.epsilon"),
        ("cohort", 4, "config.cohort: 4 is above the number of clients, 3"),
    ],
)
def test_what_only_a_simulation_can_do_is_refused(federation, field, value, words):
    config = config_of(fipa={"rounds": 2})
    config.update_from_flattened_dict({field: value})
    agreeing = functools.partial(agree, config, federation.problem.task, 3, federation.problem.test)
    with pytest.raises(ValueError, match=words):
        agreeing()


@pytest.mark.parametrize("spec", ["fipa_span", "fipa_few_bytes", "fipa_sums"])
def test_late_answers_of_no_use_are_refused_before_any_round(federation, spec):
    with pytest.raises(ValueError, match="late: the rule asks for gradients, or for curvature within a basis"):
        agree(config_of(), federation.problem.task, 3, federation.problem.test, spec=spec, late=1)


def test_duals_of_beliefs_do_not_travel(federation):
    with pytest.raises(ValueError, match=r"config\.fipa\.term\.name: the server must know what clients keep"):
        agree(config_of(), federation.problem.task, 3, federation.problem.test, spec="ivon_admm")


KEEPING = [pytest.param(TOP_K, id="top_k"), pytest.param(MOON, id="moon", marks=pytest.mark.slow)]


@pytest.mark.parametrize("spec", KEEPING)
@pytest.mark.parametrize("kept", ["memory", "file", "nothing"])
def test_a_client_goes_on_from_what_it_has_kept(spec, kept, tmp_path):
    """The second of two rounds, by the same site, by one that was started anew with its file, or without."""
    federation = Deployed(config_of(), spec)
    server, file = federation.server(), "" if kept == "nothing" else tmp_path / "kept.msgpack"

    def site(client=0):
        return Site(federation.agreement, client, federation.data(client), federation.width, memory=file)

    mine, first = site(), server.broadcast()
    mine.warm_up()
    sent = mine.work(first)
    assert sent == mine.work(first) == federation.sites[0].work(first)
    server.round({0: sent, **{one: federation.sites[one].work(first) for one in (1, 2)}})
    assert not server.wrong
    again = mine if kept == "memory" else site()
    second = server.broadcast()
    assert (again.work(second) == federation.sites[0].work(second)) is (kept != "nothing")
    if kept == "file":
        changed = federation.agreement._replace(fingerprint="0" * 64)  # as of another learning rate
        Site(changed, 0, federation.data(0), federation.width, memory=file)
        with pytest.raises(ValueError, match=r"kept\.msgpack is of client 0 of .*, and this is client 1"):
            site(1)
        file.write_bytes(file.read_bytes()[:-5])
        with pytest.raises(ValueError, match=r"kept\.msgpack"):
            site()
        file = tmp_path / "none" / "kept.msgpack"
        with pytest.raises(FileNotFoundError, match="memory: there is no folder"):
            site()


@pytest.mark.parametrize("spec", KEEPING)
def test_what_a_client_keeps_is_of_one_run_and_of_rounds_that_can_be_asked_again(spec):
    """Another run of the server finds it as at first; a server that comes back two rounds earlier finds it as then."""
    federation = Deployed(config_of(fipa={"rounds": 4}), spec)
    params, _ = federation.run()
    again, _ = federation.run()
    assert bits(again) == bits(params), "the same sites have served another run"
    server, asked, answers = federation.server(), [], []
    while not server.done:
        asked.append(server.broadcast())
        answers.append({one: site.work(asked[-1]) for one, site in enumerate(federation.sites)})
        server.round(answers[-1])
    for number in (1, 2, 3):
        assert {one: site.work(asked[number]) for one, site in enumerate(federation.sites)} == answers[number]


def test_a_round_that_is_not_finite_leaves_what_a_client_keeps():
    federation = Deployed(config_of(), TOP_K)
    server, site = federation.server(), federation.sites[0]
    first = server.broadcast()
    site.work(first)
    arrays = wire.unpack(first).arrays
    huge = {name: array * 1e200 if name.startswith("params/") else array for name, array in arrays.items()}
    site.work(wire.pack(wire.unpack(first)._replace(arrays=huge, round=1)))
    other = Deployed(config_of(), TOP_K).sites[0]
    other.work(first)
    third = wire.pack(wire.unpack(first)._replace(round=2))
    assert site.work(third) == other.work(third)


def test_late_answers_count_with_their_age():
    """Client 2 answers each broadcast a round later: what the mean makes of it is what FedBuff says."""
    config = config_of(fipa={"rounds": 3})
    deployed = Deployed(config, "fedbuff:aggregator.late.staleness=0.5", late=1)
    server, rows = deployed.server(), []
    server._journal = rows = Rows()
    kept, models = None, [server.params]
    for _ in range(3):
        sent = deployed.answers(server)
        slow, sent[2] = sent[2], kept
        kept = slow
        server.round(sent)
        models.append(server.params)
        fresh = [wire.unpack(sent[client]) for client in (0, 1)]
        entries = [(message, 0) for message in fresh] + ([(wire.unpack(sent[2]), 1)] if sent[2] else [])
        weights = np.array([float(message.arrays["num_examples"]) for message, _ in entries])
        weights *= np.array([(1 + age) ** -0.5 for _, age in entries]) / weights.sum()
        for path in ("Dense_0/kernel", "Dense_1/bias"):
            step = sum(w * m.arrays[f"delta/{path}"] for w, (m, _) in zip(weights, entries, strict=True))
            layer, leaf = path.split("/")
            moved = np.asarray(models[-1][layer][leaf]) - np.asarray(models[-2][layer][leaf])
            np.testing.assert_allclose(moved, step, rtol=1e-10)
    assert [row["age_most"] for row in rows] == [0, 1, 1]
    stale = about(kept, round=1)  # two rounds ago
    blob = deployed.answers(server)
    server.round(blob | {2: stale})
    assert "it answers round 1, and this is round 3" in server.wrong[2]


def test_a_server_can_be_asked_for_figures(federation):
    server = Server(federation.agreement, rows := Rows(), lambda params: {"test_mse": np.float64(2.0)})
    server.round({})
    assert rows[0]["test_mse"] == 2.0 and rows[0]["bytes_up"] == 0
    averaged = Deployed(config_of(), "fedavg:server.average=0.5")
    server = Server(averaged.agreement, rows := Rows(), lambda params: {"test_first": first_of(params)})
    while not server.done:
        server.round(averaged.answers(server))
        assert rows[-1]["test_first"] == first_of(server.params)
        assert rows[-1]["test_average_first"] == first_of(server.result) != first_of(server.params)


def first_of(params):
    return float(np.asarray(jax.tree.leaves(params)[0]).reshape(-1)[0])


SAME_WORK = (
    *(("fipa.rounds", 9), ("fipa.server.lr", 0.5), ("fipa.local.micro_batch", 2), ("task.file", "mine.npz")),
    *(("fipa.aggregator.damping", 0.5), ("fipa.aggregator.limits.max_step", 1.0), ("fipa.max_skips", 3)),
)
OTHER_WORK = {
    "seed": 5,
    "precision": "float32",
    "task.boundary_weight": 3.0,
    "task.standardise": "none",
    "data.loss": "squared",
    "model.activation": "relu",
    "fipa.local.lr": 5.0,
    "fipa.local.epochs": 7,
    "fipa.local.weight_decay": 0.5,
    "fipa.sketch.rank": 2,
    "fipa.aggregator.at": "broadcast",
    "fipa.term.mu": 0.5,
}


def test_the_fields_that_clients_work_by_are_told_apart_and_others_are_not():
    config = config_of()
    before = agreement.worked_by(config, config.fipa)
    config.update_from_flattened_dict(dict(SAME_WORK))
    assert agreement.worked_by(config, config.fipa) == before
    seen = {before}
    for field, value in OTHER_WORK.items():
        config.update_from_flattened_dict({field: value})  # one after another
        seen.add(agreement.worked_by(config, config.fipa))
    assert len(seen) == 1 + len(OTHER_WORK)


def test_a_site_with_another_learning_rate_is_refused_on_both_sides(federation, uploads):
    parts, params = federation.agreement.parts, federation.agreement.params
    config = federation.config.copy_and_resolve_references()
    marks = []
    for rate in (config.fipa.local.lr, 5.0):
        config.fipa.local.lr = rate
        marks.append(agreement.fingerprint_of(parts, params, agreement.worked_by(config, config.fipa)))
    assert marks[0] == federation.agreement.fingerprint != marks[1]
    theirs = Site(federation.agreement._replace(fingerprint=marks[1]), 1, federation.data(1), federation.width)
    with pytest.raises(wire.Malformed, match="or of another config"):
        theirs.work(federation.server().broadcast())
    _, wrong = after(federation, uploads | {1: about(uploads[1], fingerprint=marks[1])})
    assert "or of another config" in wrong[1]


def waiting(*given):
    return [flower.Asked(node, number) for node, number in given]


NODES = {10 + client: client for client in range(6)}  # node -> client


@pytest.mark.parametrize(
    ("answers", "without", "slots", "wanted"),
    [
        pytest.param({0: 4, 1: 4}, [(12, 4)], 3, {0, 1, 2}, id="one is silent"),
        pytest.param({0: 4, 1: 4, 3: 4}, [(12, 3), (15, 2)], 3, {0, 1, 3}, id="silent since earlier rounds"),
        pytest.param({4: 4}, [(10, 3), (12, 4), (13, 4), (14, 3)], 3, {4, 2, 3}, id="this round's alone"),
        pytest.param({0: 4, 1: 3, 2: 2, 3: 4}, [], 3, {0, 3, 1}, id="the newest of late answers"),
        pytest.param({7: 4, 8: 4, 9: 4, 0: 3}, [(11, 4)], 3, {0, 1, 7}, id="strangers last"),
        pytest.param({0: 4}, [(10, 4), (99, 4)], 3, {0}, id="asked again, and a node that never answered"),
    ],
)
def test_silent_nodes_and_strangers_never_fill_a_round(answers, without, slots, wanted):
    got = {client: (number, b"%d" % client) for client, number in answers.items()}
    sent = flower.sent_in(4, got, waiting(*without), NODES, num_clients=6, slots=slots)
    assert sent == {client: got[client][1] if client in got else None for client in wanted}
