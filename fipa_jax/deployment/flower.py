"""How does Flower carry a federation? A strategy for its ServerApp and a ClientApp, over its messages (extra `flower`).

A message's content is one ArrayRecord with one Array, whose data are the bytes of `wire`: Flower cuts arrays, and
nothing else, into pieces. Its own types of arrays are not used: they turn bfloat16 into something that has no name.

Flower's differential privacy and secure aggregation clip, blur or mask an average of updates. A sketch of curvature,
which tells more about a client's data, would travel beside it as it is: both are refused.
"""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import logging

from fipa_jax import installed
from fipa_jax.deployment import wire, worker

if TYPE_CHECKING:  # importing Flower sets an environment variable: that is for whoever makes an app
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

RECORD, ARRAY, STYPE = "fipa_jax", "message", "fipa_jax.wire"
LOST = (3, 4, 5)  # Flower's codes of errors for a message or a node that is not there any more
REMEMBERED = 8  # rounds for which a silent node's answer is still looked for, to see that it is back
PRIVACY = (
    "Flower's differential privacy and secure aggregation work on an average of updates; a sketch of curvature, which "
    "tells more of a client's data, is covered by neither. Use Fipa and client_app without wrappers or mods"
)
Answer = Callable[[bytes, Any], bytes]  # (a broadcast, Flower's Context) -> its upload
Who = Callable[[Any], int | None]  # one of `grid.get_nodes()` -> the client's number; None of a stranger


def client_app(answer: Answer) -> "ClientApp":
    """A ClientApp that answers broadcasts.

    Example:
      app = client_app(relay)

    Args:
      answer: gives the upload. An error in it reaches the server by its kind alone, as its text may hold data.
    """
    installed.check("flower", "deployment.flower", "flwr")
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: "Message", context: "Context") -> "Message":
        try:
            content = content_of(answer(blob_of(message.content), context))
        except Exception as error:
            logging.exception("the broadcast could not be answered")
            content = RecordDict({"error": ConfigRecord({"kind": f"{type(error).__name__}"})})
        return Message(content, reply_to=message)

    return app


def relay(blob: bytes, context: "Context") -> bytes:
    """The upload by the warm worker at a socket, which its node names: `--node-config 'socket="/run/two.sock"'`."""
    return worker.ask(Path(str(context.node_config["socket"])), blob)


def client_of(context: "Context") -> int:
    """The client's number, from 0, which its node says: `--node-config "partition-id=2"`; a simulation has it too.

    Raises:
      ValueError: the node was started without one.
    """
    number = context.node_config.get("partition-id")
    if number is None:
        raise ValueError('the node does not say which client it is: start it with --node-config "partition-id=N"')
    return int(number)


def content_of(blob: bytes) -> "RecordDict":
    """The content of a message that carries these bytes."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(blob),), stype=STYPE, data=blob)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def blob_of(content: "RecordDict") -> bytes:
    """The bytes that a message's content carries.

    Raises:
      ValueError: it carries something else.
    """
    record = content.array_records.get(RECORD)
    if [*content] != [RECORD] or record is None or [*record] != [ARRAY] or record[ARRAY].stype != STYPE:
        raise ValueError(f"a message with {[*content]!s:.100}, needed {[RECORD]} with bytes of fipa_jax. {PRIVACY}")
    return record[ARRAY].data


class Asked(NamedTuple):
    """A message that waits for its answer."""

    node: int
    round: int


def sent_in(
    number: int,
    got: Mapping[int, tuple[int, bytes]],
    waiting: Iterable[Asked],
    client_of: Mapping[int, int],
    num_clients: int,
    slots: int,
) -> dict[int, bytes | None]:
    """{client: its bytes, None of one that has not answered} of a round, as many as it has room for.

    Answers come first, the newest before late ones, then who was asked in this round, then strangers: no node's silence
    or claim takes another one's place.

    Args:
      number: of the round.
      got: {client: (the round that it answers, its bytes)}.
      waiting: the messages without an answer, of earlier rounds too.
      client_of: {node: client}, as far as is known.
      num_clients: T.
      slots: the room.
    """
    silent = {client_of[one.node] for one in waiting if one.round == number and one.node in client_of}
    newest = sorted(got, key=lambda client: -got[client][0])
    known = [client for client in newest if 0 <= client < num_clients]
    strangers = [client for client in newest if client not in known]
    order = dict.fromkeys((*known, *sorted(silent), *strangers))
    return {client: got[client][1] if client in got else None for client in [*order][:slots]}


class Fipa:
    """A strategy for Flower's ServerApp around a `deployment.server.Server`, for any aggregation rule.

    Every round asks a cohort of the nodes, and waits for their answers. A node that is lost, or silent for `timeout`,
    is waited for once: it is asked again in the rounds that follow, and counts as soon as it answers, but nobody waits.

    Example:
      @app.main()
      def main(grid, context):
          with server.opened(agreement, config, workdir) as federation:
              Fipa(federation).start(grid)

    Args:
      server: a `deployment.server.Server`.
      nodes: that must be there before the first round; 0 for a whole cohort.
      timeout: seconds that a round waits for answers.
      poll: seconds between two looks for answers.
      who: tells clients by their nodes, such as by `public_key` under node authentication; None believes the numbers
        that uploads bear.

    Raises:
      ImportError: Flower is not installed.
      ValueError: the method remembers clients (FedVARP, `past.kind = "latest"`), and nothing proves who they are.
    """

    def __init__(
        self,
        server: Any,
        *,
        nodes: int = 0,
        timeout: float = 3600.0,
        poll: float = 0.1,
        who: Who | None = None,
    ):
        installed.check("flower", "deployment.flower", "flwr")
        from flwr.serverapp.strategy import Strategy

        Strategy.register(Fipa)  # whose loop has no resume, no late answers, and waits for a lost node in each round
        if server.agreement.remembers and who is None:
            raise ValueError(
                "who: the method remembers each client, so that one could speak for another; start the SuperLink with "
                "node authentication, and say here which node is which client"
            )
        self.server = server
        self._nodes, self._timeout, self._poll, self._who = nodes or server.cohort, timeout, poll, who
        self._asked: dict[str, Asked] = {}  # by the message's id
        self._silent: set[int] = set()
        self._client: dict[int, int] = {}  # node -> client, as far as is known

    def start(self, grid: "Grid") -> Any:
        """Runs the rounds that are left; returns the parameters that the federation leaves.

        Raises:
          TimeoutError: within `timeout` not a node came.
        """
        if not self.server.done:
            self._gather(grid)
        while not self.server.done:
            self._round(grid)
        return self.server.result

    def summary(self) -> None:
        """Logs what is about to run."""
        logging.info("%s from round %d", self.server.agreement.name, self.server.number)

    def configure_train(self, server_round: int, arrays: "ArrayRecord", config: "ConfigRecord", grid: "Grid"):
        """Refuses: a wrapper has called, not this strategy's own loop. Raises a ValueError that says why."""
        raise ValueError(PRIVACY)

    aggregate_train = configure_evaluate = aggregate_evaluate = configure_train

    def _gather(self, grid: "Grid") -> None:
        """Waits until the nodes are there; goes on with those that came."""
        end = time.monotonic() + self._timeout
        while len(present := [*grid.get_node_ids()]) < self._nodes and time.monotonic() < end:
            time.sleep(self._poll)
        if not present:
            raise TimeoutError(f"no node came within {self._timeout} seconds")

    def _round(self, grid: "Grid") -> None:
        """One round."""
        number, start = self.server.number, time.monotonic()
        waiting = self._send(grid, self._draw(grid))
        end, got = time.monotonic() + self._timeout, {}
        while waiting and time.monotonic() < end:
            for reply in grid.pull_messages([*self._asked]):
                waiting.discard(reply.metadata.reply_to_message_id)
                self._take(reply, got)
            if waiting:
                time.sleep(self._poll)
        self._silent |= {self._asked[one].node for one in waiting}
        clients, slots = self.server.agreement.parts.num_clients, self.server.slots
        sent = sent_in(number, got, self._asked.values(), self._client, clients, slots)
        self.server.round(sent, {"seconds_answers": time.monotonic() - start})
        self._asked = {key: one for key, one in self._asked.items() if one.round > number - REMEMBERED}

    def _draw(self, grid: "Grid") -> list[int]:
        """The nodes of a round: a cohort of those that answer, and in places that are left the silent ones."""
        present = self._known([*grid.get_nodes()])
        self._silent &= {*present}
        live = [node for node in present if node not in self._silent]
        drawn = random.sample(live, min(self.server.cohort, len(live)))
        return drawn + [*self._silent][: self.server.cohort - len(drawn)]

    def _known(self, nodes: list) -> list[int]:
        """The ids of the nodes that may take part."""
        if self._who is None:
            return [node.node_id for node in nodes]
        numbers = {node.node_id: self._who(node) for node in nodes}
        self._client |= {node: client for node, client in numbers.items() if client is not None}
        return [node for node, client in numbers.items() if client is not None]

    def _send(self, grid: "Grid", nodes: Iterable[int]) -> set[str]:
        """Asks nodes; gives the ids of the messages whose answers are waited for."""
        from flwr.app import Message

        nodes, number = [*nodes], self.server.number
        blobs = self.server.broadcasts(range(len(nodes)))  # by their places: a node's id is no small number
        life = self._timeout * (1 + self.server.agreement.late)
        sent = {}
        # One by one: what a SuperLink does not take, such as for a node just gone, gets no id.
        for node, blob in zip(nodes, blobs.values(), strict=True):
            message = Message(content_of(blob), node, "train", ttl=life, group_id=str(number))
            sent |= dict.fromkeys(filter(None, grid.push_messages([message])), node)
        self._asked |= {key: Asked(node, number) for key, node in sent.items()}
        return {key for key, node in sent.items() if node not in self._silent} or {*sent}

    def _take(self, reply: "Message", got: dict[int, tuple[int, bytes]]) -> None:
        """Puts a reply into `got`, {client: (round that it answers, bytes)}, if it is of any use."""
        asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if asked is None:
            return
        if reply.has_error() and reply.error.code in LOST:
            logging.warning("node %d is lost: %s", asked.node, reply.error.reason)
            self._silent.add(asked.node)
            return
        self._silent.discard(asked.node)
        try:
            blob = self._blob(reply)
            client = wire.client_of(blob)
        except ValueError as error:
            logging.warning("round %d: node %d is left out: %s", asked.round, asked.node, error)
            return
        if self._client.setdefault(asked.node, client) != client:
            logging.warning("node %d is client %d, and says %d", asked.node, self._client[asked.node], client)
        elif (
            got.get(client, (-1, b""))[0] < asked.round
            and self.server.number - asked.round <= self.server.agreement.late
        ):
            got[client] = asked.round, blob

    def _blob(self, reply: "Message") -> bytes:
        """The bytes of a reply; raises a ValueError where it has none."""
        if reply.has_error():
            raise ValueError(f"Flower's error {reply.error.code}: {reply.error.reason!s:.300}")
        failed = reply.content.config_records.get("error")
        if failed is not None:
            raise ValueError(f"its work ended with {failed.get('kind')!s:.100}; its own log says more")
        return blob_of(reply.content)
