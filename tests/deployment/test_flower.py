"""Flower as the transport: both apps in one process, over its real messages; and what becomes of a node's silence."""

import types

import numpy as np
import pytest
from helpers.deployed import Deployed, bits, config_of

from fipa_jax.client import terms
from fipa_jax.deployment import flower, wire, worker

pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[flower]'")

FIRST = 2**63 + 5  # ids of nodes are unsigned, and larger than what a float can count


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Whose messages these are, which Flower's own processes set."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def federation():
    config = config_of(fipa={"rounds": 3})
    config.fipa.sketch.solver, config.fipa.local.batch_size = "rows", 0
    return Deployed(config)


class Grid:
    """Flower's grid in this process: every message is written and read as on its way, and answered at once.

    Args:
      app: the ClientApp.
      nodes: {node: client}.
      instead: (node, the round's number from 0, its reply) -> what comes instead, None for nothing yet.
    """

    def __init__(self, app, nodes, instead=lambda node, number, reply: reply):
        self.app, self.nodes, self.instead, self.waiting, self.asked, self.sent = app, nodes, instead, {}, [], 0

    def get_node_ids(self):
        return [*self.nodes]

    def get_nodes(self):
        return [types.SimpleNamespace(node_id=node, name=f"client-{client}") for node, client in self.nodes.items()]

    def push_messages(self, messages):
        ids = []
        for message in messages:
            node, self.sent = message.metadata.dst_node_id, self.sent + 1
            self.asked.append((int(message.metadata.group_id), node))
            if node not in self.nodes:
                ids.append(None)
                continue
            message.metadata.__dict__["_message_id"] = str(self.sent)
            ids.append(str(self.sent))
            self.waiting[ids[-1]] = message
        return ids

    def pull_messages(self, ids):
        replies = []
        for one in [one for one in ids if one in self.waiting]:
            message = self.waiting[one]
            node = message.metadata.dst_node_id
            reply = self.instead(node, int(message.metadata.group_id), self.answer(message, node))
            if reply is not None:
                del self.waiting[one]
                replies.append(reply)
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message, node):
        from flwr.app import Context, Message, RecordDict

        there = RecordDict.inflate(message.content.deflate(), children=children(message.content))
        message = Message(there, metadata=message.metadata)
        return self.app(message, Context(1, node, {"partition-id": self.nodes[node]}, RecordDict(), {}))


def children(content):
    """{id: object}, what Flower sends one by one, read back from its bytes."""
    found = {}
    for record in content.values():
        inner = {}
        for array in (record.children or {}).values():
            chunks = {key: type(chunk).inflate(chunk.deflate()) for key, chunk in (array.children or {}).items()}
            inner[array.object_id] = type(array).inflate(array.deflate(), children=chunks)
        found[record.object_id] = type(record).inflate(record.deflate(), children=inner or None)
    return found


def app_of(federation):
    return flower.client_app(lambda blob, context: federation.sites[flower.client_of(context)].work(blob))


NODES = {FIRST + 11 * client: client for client in range(3)}


def run(federation, instead=lambda node, number, reply: reply, nodes=NODES, **options):
    """(the model's bits after all rounds, the grid, the strategy)."""
    grid = Grid(app_of(federation), nodes, instead)
    strategy = flower.Fipa(federation.server(), poll=0.01, **{"timeout": 0.2, **options})
    return bits(strategy.start(grid)), grid, strategy


def by_hand(federation, absent=()):
    """The model's bits after all rounds without Flower, `absent` being (round, client) that do not answer."""
    server = federation.server()
    while not server.done:
        sent = federation.answers(server)
        server.round({client: sent[client] for client in sent if (server.number, client) not in absent})
    return bits(server.params)


def test_rounds_over_flowers_messages_are_those_without(federation):
    got, grid, _ = run(federation)
    assert got == by_hand(federation)
    assert sorted(grid.asked) == [(number, node) for number in range(3) for node in sorted(NODES)]


def replaced(node, number, make):
    """An `instead` that gives `make(reply)` for what a node answers in a round."""
    return lambda at, k, reply: make(reply) if (at, k) == (node, number) else reply


def content(reply, blob):
    from flwr.app import Message

    return Message(flower.content_of(blob), metadata=reply.metadata)


def error(reply, code):
    from flwr.app import Error, Message

    return Message(Error(code, "gone"), metadata=reply.metadata)


def of_other_record(reply):
    from flwr.app import ArrayRecord, Message, RecordDict

    record = RecordDict({"fipa_jax": ArrayRecord([np.zeros(3)]), "metrics": ArrayRecord()})
    return Message(record, metadata=reply.metadata)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda reply: content(reply, flower.blob_of(reply.content)[:-3]), id="cut"),
        pytest.param(lambda reply: content(reply, b"hello"), id="other bytes"),
        pytest.param(lambda reply: content(reply, b""), id="no bytes"),
        pytest.param(lambda reply: error(reply, 2), id="an exception"),
        pytest.param(of_other_record, id="another record"),
    ],
)
def test_a_malformed_reply_is_an_absent_client(federation, make):
    second = [*NODES][1]
    got, grid, strategy = run(federation, replaced(second, 1, make))
    assert got == by_hand(federation, absent={(1, 1)}) and (2, second) in grid.asked
    assert not strategy._silent


def test_a_client_whose_work_fails_says_the_kind_of_error_alone(federation):
    def answer(blob, context):
        if flower.client_of(context) == 1 and wire.unpack(blob).round == 1:
            raise FileNotFoundError("/home/patients/miller.csv")
        return federation.sites[flower.client_of(context)].work(blob)

    grid = Grid(flower.client_app(answer), NODES)
    seen = []
    grid.instead = lambda node, number, reply: seen.append(str(reply.content)) or reply
    got = bits(flower.Fipa(federation.server(), poll=0.01).start(grid))
    assert got == by_hand(federation, absent={(1, 1)})
    assert any("FileNotFoundError" in text for text in seen) and not any("miller" in text for text in seen)


def test_a_lost_node_is_waited_for_once_and_counts_when_it_is_back(federation, monkeypatch):
    """Silent in the first round, it answers in the last one: the second does not wait."""
    second, waits = [*NODES][1], []
    monkeypatch.setattr(flower.time, "sleep", lambda seconds: waits.append(seconds))
    clock = iter(np.arange(10_000) * 0.01)
    monkeypatch.setattr(flower.time, "monotonic", lambda: float(next(clock)))
    strategy = None

    def instead(node, number, reply):
        return None if node == second and number < 2 else reply

    per_round = []
    server = federation.server()
    count = server.round
    monkeypatch.setattr(server, "round", lambda *given: per_round.append(len(waits)) or count(*given))
    strategy = flower.Fipa(server, poll=0.01, timeout=0.2)
    got = bits(strategy.start(Grid(app_of(federation), NODES, instead)))
    assert per_round[0] > 0 and per_round[1] == per_round[0]  # it waited in the first round alone
    assert got in (by_hand(federation, {(0, 1), (1, 1)}), by_hand(federation, {(0, 1), (1, 1), (2, 1)}))


def test_a_node_that_the_superlink_gives_up_is_absent(federation):
    second = [*NODES][1]
    got, _, strategy = run(federation, lambda node, number, reply: error(reply, 5) if node == second else reply)
    assert got == by_hand(federation, {(number, 1) for number in range(3)}) and strategy._silent == {second}


def test_a_client_that_answers_twice_counts_once(federation):
    """A node that bears the number of another one's client."""
    got, _, _ = run(federation, nodes={**NODES, [*NODES][1]: 2})
    assert got == by_hand(federation, {(number, 1) for number in range(3)})


def test_nodes_that_say_nobodys_number_are_told_what_to_do(federation):
    from flwr.app import Context, RecordDict

    with pytest.raises(ValueError, match="partition-id=N"):
        flower.client_of(Context(1, 1, {}, RecordDict(), {}))


def test_who_tells_clients_by_their_nodes(federation):
    """A node that its own word makes another client is left out."""
    liar = {**NODES, [*NODES][1]: 2}

    def who(node):
        return [*NODES].index(node.node_id)

    got, _, _ = run(federation, nodes=liar, who=who)
    assert got == by_hand(federation, {(number, 1) for number in range(3)})


@pytest.mark.parametrize("of", ["rule", "term"])
def test_rules_that_remember_clients_ask_who_they_are(federation, of):
    parts = with_ids(federation) if of == "rule" else federation.agreement.parts._replace(term=terms.varp())
    server = types.SimpleNamespace(agreement=federation.agreement._replace(parts=parts), cohort=3)
    with pytest.raises(ValueError, match="node authentication"):
        flower.Fipa(server)
    flower.Fipa(server, who=lambda node: 0)


def with_ids(federation):
    parts = federation.agreement.parts
    needs = parts.aggregator.needs._replace(ids=True)
    return parts._replace(aggregator=parts.aggregator._replace(needs=needs))


def test_flowers_differential_privacy_and_other_wrappers_are_refused_in_words(federation):
    from flwr.app import ArrayRecord
    from flwr.serverapp import strategy as flowers

    inner = flower.Fipa(federation.server())
    assert isinstance(inner, flowers.Strategy)
    wrapped = flowers.DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 3)
    with pytest.raises(ValueError, match="sketch of curvature"):
        wrapped.start(Grid(app_of(federation), NODES), ArrayRecord(), num_rounds=1)


def test_a_mod_that_changes_what_travels_is_refused_at_the_client(federation):
    from flwr.app import ConfigRecord

    message = flower.content_of(federation.server().broadcast())
    message["clipping"] = ConfigRecord({"norm": 1.0})
    with pytest.raises(ValueError, match="differential privacy"):
        flower.blob_of(message)


def test_no_node_at_all_is_an_error(federation):
    with pytest.raises(TimeoutError, match="no node came within"):
        run(federation, nodes={})


def test_a_relay_answers_as_the_site_behind_it(federation, tmp_path):
    from threading import Thread

    path = tmp_path / "one.sock"
    answers = iter([False, False, True])  # one is the look whether somebody answers there
    serving = Thread(target=worker.serve, args=(federation.sites[1].work, path, lambda: next(answers)))
    serving.start()
    blob = federation.server().broadcast()
    context = types.SimpleNamespace(node_config={"socket": str(path)})
    assert flower.relay(blob, context) == federation.sites[1].work(blob)
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(FileExistsError, match="another worker"):
        worker.serve(federation.sites[1].work, path)
    with pytest.raises(worker.Failed, match="Malformed"):
        worker.ask(path, b"nonsense")
    serving.join()
    with pytest.raises(FileNotFoundError):
        worker.ask(path, blob, patience=0)


@pytest.mark.slow
def test_a_late_answer_counts_with_its_age():
    """A node whose answers come a round late, each while the next one is on its way."""
    late = Deployed(config_of(fipa={"rounds": 3}), "fedbuff:aggregator.late.staleness=0.5", late=1)
    third, server = [*NODES][2], late.server()

    def instead(node, number, reply):
        return None if node == third and number == server.number else reply

    got = bits(flower.Fipa(server, poll=0.01, timeout=0.5).start(Grid(app_of(late), NODES, instead)))
    by_hand, kept = late.server(), None
    while not by_hand.done:
        sent = late.answers(by_hand)
        kept, sent[2] = sent[2], kept
        by_hand.round(sent)
    assert got == bits(by_hand.params)
