"""What does the server of a real federation do? It says what to send, and makes a round of the bytes that come back.

Whatever carries them, files, Flower or a web server, calls `Server.round`; behind it is the same `serve` as in a
simulation. A client that is silent, late beyond what is allowed, or sends what does not fit is an absent one.
"""

import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fipa_jax import files, trees
from fipa_jax.aggregate.server_optimizers import Averaged
from fipa_jax.aggregate.uploads import Message, Uploads, collect
from fipa_jax.client.examples import Client
from fipa_jax.client.local_solver import LocalResult
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors
from fipa_jax.curvature.sketch import Diagonal, Report, Sketch
from fipa_jax.deployment import packing, wire
from fipa_jax.deployment.agreement import RUN, Agreement, broadcast_of, only
from fipa_jax.deployment.site import name_of
from fipa_jax.federation import parts as parts_lib
from fipa_jax.federation import round as round_lib
from fipa_jax.federation.channel import Channel, Order
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.population import Cohort
from fipa_jax.federation.server import result_of, serve
from fipa_jax.federation.state import State, fetch, keep
from fipa_jax.reporting import console, metrics
from fipa_jax.run.loop import check_progress
from fipa_jax.saving import provenance
from fipa_jax.saving.journal import Journal, Rows
from fipa_jax.saving.model_files import export, stems
from fipa_jax.saving.resume import open_at

Sent = Mapping[int, bytes | None]  # {client: its bytes; None of one that was asked and has not answered}


@contextlib.contextmanager
def opened(
    agreement: Agreement,
    config: ConfigDict,
    workdir: Path,
    figures: Callable[[Any], dict] = lambda params: {},
    resume: str = "yes",
) -> Iterator["Server"]:
    """A context with a federation's server, whose rows, checkpoints and model are in a work directory, as a run's are.

    There is a checkpoint after each round, whatever `config.checkpoint.seconds` says, and a server that was stopped or
    killed goes on from the last one. When all rounds are over the model is written, `NAME.msgpack`.

    Args:
      agreement: on a method of this config.
      config: all fields.
      workdir: see `saving.resume.open_at`.
      figures: see `Server`.
      resume: see `saving.resume.open_at`.

    Raises:
      ValueError: see `saving.resume.open_at`.
    """
    workdir, config = files.local(workdir, "workdir"), only(config, agreement.name)
    config.checkpoint.seconds = 0.0
    come_from = {"data": {"fingerprint": agreement.fingerprint}, "code": provenance.of_code()}
    with open_at(workdir, config, come_from, resume) as journal:
        server = Server(agreement, journal, figures, config.first_round)
        yield server
        if server.done:
            export(workdir / f"{stems([agreement.name])[agreement.name]}.msgpack", server.result)


class Server:
    """A federation's server, with a state of its own.

    Example:
      server = Server(agreement)
      while not server.done:
          blobs = server.broadcasts(server.draw())
          info = server.round({client: ask(client, blob) for client, blob in blobs.items()})

    Args:
      agreement: the federation's.
      journal: where rows and checkpoints go, as `saving.resume.open_at` opens it; a run that was stopped goes on from
        its last checkpoint. None for a list in memory.
      figures: params -> {name: number}, for the rows, such as those of a test set.
      first: the number of the first round.

    Attributes:
      agreement: as it was given.
      wrong: {client: why, in words}, whose bytes were of no use in the last round.
      last: the last round's row.
      slots: how many uploads a round can hold.
    """

    def __init__(
        self,
        agreement: Agreement,
        journal: Journal | Rows | None = None,
        figures: Callable[[Any], dict] = lambda params: {},
        first: int = 0,
    ):
        self.wrong: dict[int, str] = {}
        self.last: dict = {}
        self.agreement, self._figures, self._first = agreement, figures, first
        self._journal = Rows() if journal is None else journal
        cohort, clients = agreement.parts.cohort, agreement.parts.num_clients
        self.slots = min(clients, cohort * (1 + agreement.late))  # compiled once
        with agreement.precision():
            self._parts, first_params = agreement.of_server(), jax.tree.map(jnp.asarray, agreement.params)
            blank = parts_lib.init(self._parts, first_params, first, agreement.store_on_host)
            self._state, note = self._journal.resumed(agreement.name, blank, self._parts)
        self._run = note.get("run") or secrets.token_hex(RUN)  # another in each run that begins anew
        self._skipped, self._number = note.get("skipped", 0), int(self._state.round)
        self._said: dict[bool, bytes] = {}  # {whether it asks for curvature: the round's broadcast}
        self._drawn: list[int] = []  # the clients of the round, once they have been given broadcasts
        self._down = 0  # bytes of the broadcasts that have been given out

    @property
    def cohort(self) -> int:
        """How many clients a round asks."""
        return self.agreement.parts.cohort

    @property
    def number(self) -> int:
        """The number of the round that comes next."""
        return self._number

    @property
    def done(self) -> bool:
        """Whether all rounds of the agreement are over."""
        return self._number >= self._first + self.agreement.rounds

    @property
    def params(self) -> Any:
        """The model's parameters, from which the next round starts."""
        return self._state.params

    @property
    def result(self) -> Any:
        """The parameters that the federation leaves: the last ones, or their mean, `config.fipa.server.average`."""
        with self.agreement.precision():
            return result_of(self._parts, self._state)

    def draw(self, among: Iterable[int] | None = None) -> list[int]:
        """The clients of the next round, ascending; those of a simulation where all clients can be reached.

        Args:
          among: the clients that can be reached; None for all.
        """
        parts = self.agreement.parts._replace(channel=Channel())
        reached = range(parts.num_clients) if among is None else sorted(set(among))
        if len(reached) < parts.num_clients:
            return sorted(Random(f"cohort {self._number}").sample(reached, min(parts.cohort, len(reached))))
        with self.agreement.precision():
            ids, _ = round_lib.draw(parts, jnp.int32(self._number), self.agreement.rates, self.agreement.root)
        return sorted(np.asarray(ids).tolist())

    def broadcasts(self, clients: Iterable[int]) -> dict[int, bytes]:
        """{client: what it is sent} of the clients of the next round.

        With `sketch.share` below 1 some are asked for curvature and the others are not: they are drawn anew in each
        round, as in a simulation.

        Args:
          clients: all of the round at once, by their numbers, or other numbers below 2^31 that tell them apart.

        Raises:
          ValueError: with such a share, a second call in a round names other clients: the draw is among all of them.
        """
        clients = sorted(clients)
        if self.agreement.in_turns and self._drawn not in ([], clients):
            raise ValueError(f"clients: this round's are {self._drawn}, and all are drawn from at once; got {clients}")
        self._drawn = clients
        due = dict.fromkeys(clients, True)
        if self.agreement.in_turns and clients:
            with self.agreement.precision():
                lots = jnp.asarray(clients, jnp.int32)
                drawn = round_lib.due_of(self.agreement.parts, jnp.int32(self._number), lots, self.agreement.root)
            due = dict(zip(clients, np.asarray(drawn).tolist(), strict=True))
        blobs = {client: self._blob(asked) for client, asked in due.items()}
        self._down += sum(map(len, blobs.values()))
        return blobs

    def broadcast(self) -> bytes:
        """What every client of the next round is sent, where all are sent the same.

        Raises:
          ValueError: they are not, see `broadcasts`.
        """
        if self.agreement.in_turns:
            raise ValueError("sketch.share: not all clients of a round are asked the same; call broadcasts(clients)")
        return self._blob(True)

    def _blob(self, due: bool) -> bytes:
        """The broadcast for clients that send curvature, or do not; made once a round."""
        if due not in self._said:
            given = self.agreement, self.params, self._state.aggregator, self._number
            self._said[due] = broadcast_of(*given, due, bytes.fromhex(self._run))
        return self._said[due]

    def round(self, sent: Sent, seconds: Mapping[str, float] | None = None) -> dict:
        """One round from what clients have sent: its info, see `federation.server.serve`; `wrong` says who is left out.

        Args:
          sent: by the client's number, in any order: those that were asked, and with an agreement that lets answers be
            late also those that answer an earlier round. Who is not in it is absent.
          seconds: {name: seconds} of the transport, for the row.

        Raises:
          ValueError: there are more clients than the agreement has room for, or one is no number.
          OSError, saving.signals.Stopped: of the journal.
          run.loop.Stalled: too many rounds in a row were skipped.
        """
        if len(sent) > self.slots or not all(isinstance(client, int) for client in sent):
            raise ValueError(f"sent: needed at most {self.slots} clients, got {len(sent)}, or integers, got {[*sent]}")
        start = time.perf_counter()
        down = self._down if self._down or self.agreement.in_turns else len(self.broadcast()) * len(sent)
        with self.agreement.precision():
            uploads, losses, ages = self._read(sent)
            reading = time.perf_counter()
            orders = Order(age=jnp.asarray(ages)) if self.agreement.late else Order()
            seen = fetch(self._state, uploads.ids)
            seen, info = _serve(self._parts, seen, self.agreement.rates, uploads, losses, orders)
            self._state, info = keep(self._state, seen, uploads.ids), jax.device_get(info)
            own = {"seconds_read": reading - start, "seconds_aggregate": time.perf_counter() - reading}
            figures = self._figures_of(self._state)
        up = sum(len(blob) for blob in sent.values() if isinstance(blob, bytes | bytearray))
        self._write(figures | console.figures(info) | {"bytes_down": down, "bytes_up": up} | own | dict(seconds or {}))
        return info

    def _read(self, sent: Sent) -> tuple[Uploads, np.ndarray, np.ndarray]:
        """(the uploads, their training losses, their ages), each [C]; notes who is wrong."""
        read, self.wrong = {}, {}
        for client, blob in sent.items():
            try:
                read[client] = self._one(client, blob)
            except wire.Malformed as error:
                self.wrong[client] = str(error)
        ids = self._places(sent)
        blank = None, np.nan, 0
        each, losses, ages = zip(*(read.get(client, blank) for client in ids), strict=True)
        chosen = trees.select(self._state.params, self.agreement.parts.trainable)
        uploads, misfits = collect(each, chosen, self.agreement.like[0])
        self.wrong |= {ids[place]: why for place, why in misfits.items() if ids[place] in read}
        for client, why in sorted(self.wrong.items()):
            logging.warning("round %d: client %d is left out: %s", self._number, client, why)
        losses = [np.nan if place in misfits else loss for place, loss in enumerate(losses)]
        counts = jnp.asarray(uploads.num_examples, jnp.float32)  # also where nobody has sent any: a round compiles once
        uploads = uploads._replace(num_examples=counts, ids=jnp.asarray(ids, jnp.int32))
        return uploads, np.asarray(losses, self.agreement.like[1].dtype), np.asarray(ages, np.int32)

    def _one(self, client: int, blob: bytes | None) -> tuple[Uploads, float, int]:
        """(the upload, its training loss, its age) of one client's bytes; raises `Malformed` where they do not do."""
        if not isinstance(blob, bytes | bytearray):
            raise wire.Malformed("it has not answered" if blob is None else f"needed bytes, got {type(blob).__name__}")
        if not 0 <= client < self.agreement.parts.num_clients:
            raise wire.Malformed(f"it is none of the {self.agreement.parts.num_clients} clients")
        message = wire.expect(blob, "upload", self.agreement.fingerprint)
        if message.client != client:
            raise wire.Malformed(f"it says that it is client {message.client}")
        age = self._number - message.round
        if not 0 <= age <= self.agreement.late:
            raise wire.Malformed(f"it answers round {message.round}, and this is round {self._number}")
        upload, loss = upload_of(message.arrays, self.agreement.like, self.agreement.bits)
        return upload, loss, age

    def _places(self, sent: Sent) -> list[int]:
        """[C] clients, ascending: those of the round, and as many others as make a round compile once."""
        total = self.agreement.parts.num_clients
        ids = {client for client in sent if 0 <= client < total}
        spare = (client for client in range(total) if client not in ids)
        return sorted(ids | {next(spare) for _ in range(self.slots - len(ids))})

    def _write(self, figures: dict) -> None:
        """Writes the round's row, and keeps what the next ones need."""
        name, journal, note = self.agreement.name, self._journal, {"first": self._first, "chunk": 1}
        row = self.last = metrics.jsonable({"run": name, "round": self._number} | figures)
        self._number, self._said, self._drawn, self._down = self._number + 1, {}, [], 0
        self._skipped = self._skipped + 1 if row.get("skipped") else 0
        journal.write(row)
        check_progress(name, row, self._skipped, self.agreement.max_skips)
        note |= {"skipped": self._skipped, "run": self._run}
        journal.keep(name, self._state, row, note, ended=self.done)

    def _figures_of(self, state: State) -> dict:
        """The figures of the model, and as `test_average_*` those of the average where there is one."""
        mean = self._figures(result_of(self._parts, state)) if isinstance(state.server, Averaged) else {}
        named = {f"test_average_{name.removeprefix('test_')}": value for name, value in mean.items()}
        return self._figures(state.params) | named


@functools.partial(jax.jit, static_argnums=0)
def _serve(parts: Parts, state, rates, uploads: Uploads, losses: jax.Array, orders: Order):
    """`serve` for a round whose clients have done their work elsewhere; NaN losses [C] are of those that are absent."""
    clients = Client(jnp.zeros([len(losses), 1], jnp.int32), uploads.num_examples)
    cohort, here = Cohort(uploads.ids, clients, {}, orders), ~jnp.isnan(losses)
    mean_loss = trees.ratio(jnp.sum(jnp.where(here, losses, 0)), jnp.sum(here))
    results = LocalResult(uploads.delta, state.store, jnp.where(here, losses, 0), uploads.loss, uploads.damping)
    state, info = serve(parts, state, rates, cohort, results, uploads.sketch)
    return state, info | {"local_loss": mean_loss}


def upload_of(arrays: Mapping[str, np.ndarray], like: tuple[Uploads, Any], bits: packing.Bits) -> tuple[Uploads, float]:
    """(one client's upload, its training loss) from a message's arrays; what was left out as zero is there again.

    Args:
      arrays: {name on the wire: array}.
      like: the shapes of what was asked for.
      bits: in how many bits entries travel.

    Raises:
      wire.Malformed: they are not what was asked for.
    """
    asked, loss = like
    numbers = {"num_examples": asked.num_examples, "local_loss": loss, "loss": asked.loss, "damping": asked.damping}
    needed = {name: ((), form.dtype) for name, form in numbers.items() if form is not None}
    needed |= {f"delta/{path}": (leaf.shape, leaf.dtype) for path, leaf in trees.paths(asked.delta).items()}
    arrays = packing.unpacked(arrays, bits, _packed_forms(asked))
    kept = np.shape(arrays.get("sketch/eigenvalues", np.zeros(0)))
    needed |= _forms_of_curvature(asked.sketch, kept)
    for name in (*needed, *arrays):
        got = (arrays[name].shape, arrays[name].dtype) if name in arrays else None
        if got != needed.get(name):
            raise wire.Malformed(f"{name:.200}: it has sent {_words(got)}, asked for {_words(needed.get(name))}")
    values = {name: arrays[name] for name, form in numbers.items() if form is not None}
    loss = float(values.pop("local_loss"))
    delta = {path: arrays[f"delta/{path}"] for path in asked.delta}
    return Uploads(delta=delta, sketch=_curvature_of(arrays, asked.sketch), **values), loss


def _packed_forms(asked: Uploads) -> dict[str, Any]:
    """{name on the wire: what has a shape and a type} of what may come packed."""
    forms = {f"delta/{path}": leaf for path, leaf in trees.paths(asked.delta).items()}
    if isinstance(asked.sketch, Sketch):
        forms[packing.BASIS] = asked.sketch.basis
    elif isinstance(asked.sketch, Core):
        forms[packing.CORE] = asked.sketch.values
    return forms


def _words(form: tuple | None) -> str:
    return "nothing of the kind" if form is None else f"{np.dtype(form[1]).name} {[*form[0]]!s:.100}"


def _forms_of_curvature(asked: Message, kept: tuple) -> dict[str, tuple]:
    """{name: (shape, type)} of a sketch, whose eigenvalues have the shape `kept`, a diagonal, an image or a core."""
    if asked is None:
        return {}
    if isinstance(asked, Diagonal | Image | Core):
        return {name_of(asked): (asked.values.shape, asked.values.dtype)}
    if isinstance(asked, LayerFactors):
        return {f"layers/{path}": (half.shape, half.dtype) for path, half in trees.paths(asked).items()}
    if len(kept) != 1 or kept > asked.eigenvalues.shape:
        raise wire.Malformed(
            f"sketch/eigenvalues: it has sent {[*kept]}, asked for {[*asked.eigenvalues.shape]} at most"
        )
    forms = {"rank": ((), np.dtype(np.int32)), "eigenvalues": (kept, asked.eigenvalues.dtype)}
    forms["basis"] = ((asked.basis.shape[0], *kept), asked.basis.dtype)
    if asked.report is not None:
        report = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.paths(asked.report).items()}
        report["residuals"] = (kept, report["residuals"][1])
        forms |= {f"report/{path}": form for path, form in report.items()}
    return {f"sketch/{name}": form for name, form in forms.items()}


def _curvature_of(arrays: Mapping[str, np.ndarray], asked: Message) -> Message:
    """The sketch with all of its R pairs, or the diagonal, from arrays that have their forms."""
    if asked is None:
        return None
    if isinstance(asked, Diagonal | Image | Core):
        return type(asked)(arrays[name_of(asked)])
    if isinstance(asked, LayerFactors):
        return trees.replace(asked, {path: arrays[f"layers/{path}"] for path in trees.paths(asked)})
    rank, sent = asked.eigenvalues.shape[0], int(arrays["sketch/rank"])
    if sent != rank:
        raise wire.Malformed(f"sketch/rank: its sketch is of rank {sent}, asked for {rank}")

    def padded(array: np.ndarray) -> np.ndarray:
        missing = rank - array.shape[-1]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array

    eigenvalues, basis = padded(arrays["sketch/eigenvalues"]), padded(arrays["sketch/basis"])
    if asked.report is None:
        return Sketch(eigenvalues, basis)
    flags = {name: arrays[f"sketch/report/flags/{name}"] for name in asked.report.flags}
    names = (name for name in Report._fields if name not in ("residuals", "flags"))
    report = {name: arrays[f"sketch/report/{name}"] for name in names}
    residuals = padded(arrays["sketch/report/residuals"])
    return Sketch(eigenvalues, basis, Report(residuals=residuals, flags=flags, **report))
