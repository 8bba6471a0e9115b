"""What does a client of a real federation do? It answers a broadcast by what it has made of it beside its own data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import files, trees
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client.examples import Client
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors
from fipa_jax.curvature.sketch import Diagonal, Sketch
from fipa_jax.deployment import packing, wire
from fipa_jax.deployment.agreement import (
    RUN,
    Agreement,
    broadcast_of,
    client_state,
    fingerprint_of,
    first_rule,
    first_store,
    work_of,
)
from fipa_jax.federation.population import Cohort
from fipa_jax.saving.model_files import export, load

REWOUND = 3  # rounds that can be answered again: a server that was killed may come back some rounds earlier


class Kept(NamedTuple):
    """What a client's term keeps while a server runs."""

    run: bytes  # by which runs of a server are told apart
    before: dict[int, Any]  # {round: the store [1, ...] before it} of the last `REWOUND` that were answered
    after: Any  # [1, ...], the store now


class Site:
    """A client beside its data. Between two rounds it keeps compiled programs, and what its term keeps.

    That counts from the next round on: a broadcast that comes again is answered as before. With another run of the
    server it begins anew. Whether an update has arrived and was taken the client does not hear: one that was lost, left
    out, or of a round that was skipped, counts as sent.

    Example:
      site = Site(agreement, client=2, data={"x": x, "y": y})
      upload = site.work(broadcast)

    Args:
      agreement: the federation's.
      client: its number, from 0.
      data: {field: [N, ...]}, its own examples.
      width: to how many examples its draws are padded, N or more; 0 for N. A simulation pads to its largest client: the
        same width draws the same batches.
      memory: a file of this client alone for what its term keeps (`feedback`, `moon`), where the process may be started
        anew; "" for none.

    Raises:
      ValueError: there is no such client; fields differ in their lengths, or from the example that was agreed on; the
        file is damaged, or of another client, method or model.
      FileNotFoundError: the file's folder is not there.
    """

    def __init__(
        self, agreement: Agreement, client: int, data: Mapping[str, Any], width: int = 0, memory: str | Path = ""
    ):
        if not isinstance(client, int | np.integer) or not 0 <= client < agreement.parts.num_clients:
            raise ValueError(f"client: needed 0 to {agreement.parts.num_clients - 1}, got {client}")
        lengths = {len(field) for field in data.values()}
        if len(lengths) != 1 or not all(lengths):
            raise ValueError(f"data: needed as many examples in each field, one at least, got {sorted(lengths)}")
        _check_fields(data, agreement.example)
        self._agreement, self._client, (number,) = agreement, client, lengths
        indices = np.zeros([1, max(width, number)], np.int32)
        indices[0, :number] = np.arange(number)
        with agreement.precision():
            clients = Client(jnp.asarray(indices), jnp.asarray([number], jnp.int32))
            rows = np.minimum(np.arange(indices.shape[1]), number - 1)  # sites of the same width share a program
            fields = {name: jnp.asarray(np.asarray(field)[rows]) for name, field in data.items()}
            self._cohort = Cohort(jnp.asarray([client], jnp.int32), clients, fields)
            self._first = first_store(agreement, agreement.params)
            self._file = files.local(memory, "memory") if memory and agreement.keeps else None
            self._kept = self._read() or Kept(b"", {}, self._first)

    def work(self, blob: bytes) -> bytes:
        """The upload that answers a broadcast.

        Raises:
          wire.Malformed: it is none, or of a federation with other parameters.
        """
        upload, kept = self._answer(wire.expect(blob, "broadcast", self._agreement.fingerprint))
        if self._agreement.keeps:
            self._kept = kept
            self._write()
        return upload

    def warm_up(self) -> None:
        """Compiles what rounds need, by one of each kind on the first model: the first message need not wait for it."""
        agreement = self._agreement
        with agreement.precision():
            rule = first_rule(agreement.parts, agreement.params)
            kinds = [
                broadcast_of(agreement, agreement.params, rule, 0, due)
                for due in (True, False)[: 1 + agreement.in_turns]
            ]
        for blob in kinds:
            self._answer(wire.expect(blob, "broadcast", agreement.fingerprint))

    def _answer(self, broadcast: wire.Message) -> tuple[bytes, Kept]:
        """(the upload that answers a broadcast, what is kept after it)."""
        agreement, number = self._agreement, broadcast.round
        with agreement.precision():
            due, run, params, said = self._seen(broadcast)
            kept = self._kept if self._kept.run == run else Kept(run, {}, self._first)
            before = kept.before.get(number, kept.after)
            state = client_state(agreement, params, said, jnp.int32(number), before)
            uploads, loss, after = work_of(
                agreement.of_clients(due), state, agreement.rates, self._cohort, agreement.root
            )
            if not trees.is_finite((uploads.delta, loss, after))[0]:  # the server leaves it out, too
                after = before
            one, loss = jax.tree.map(lambda leaf: np.asarray(leaf)[0], (uploads, loss))
        earlier = sorted(round for round in kept.before if round < number)
        last = {round: kept.before[round] for round in earlier[1 - REWOUND :]}
        arrays = packing.packed(arrays_of(one, loss), agreement.bits)
        upload = wire.pack(wire.Message("upload", broadcast.fingerprint, number, self._client, arrays))
        return upload, Kept(run, last | {number: before}, after)

    def _owner(self) -> str:
        """Whose file it is."""
        model = fingerprint_of(self._agreement.parts, self._agreement.params)
        return f"client {self._client} of {self._agreement.name!r}, {model}"

    def _write(self) -> None:
        """Writes what is kept to the file, if there is one."""
        if self._file:
            before = {str(number): store for number, store in self._kept.before.items()}
            words = {"owner": self._owner().encode(), "run": self._kept.run}
            texts = {name: np.frombuffer(text, np.uint8) for name, text in words.items()}
            export(self._file, texts | {"before": before, "after": self._kept.after})

    def _read(self) -> Kept | None:
        """What the file has kept; None where there is none."""
        if self._file is None:
            return None
        if not self._file.parent.is_dir():
            raise FileNotFoundError(f"memory: there is no folder {self._file.parent}")
        if not self._file.is_file():
            return None
        held = load(self._file)
        owner = bytes(held.get("owner", b"")).decode(errors="replace")
        if owner != self._owner():
            raise ValueError(f"memory: {self._file} is of {owner or 'something else'}, and this is {self._owner()}")
        before = {int(number): self._fitted(store) for number, store in held["before"].items()}
        return Kept(bytes(held["run"]), before, self._fitted(held["after"]))

    def _fitted(self, store: Any) -> Any:
        return jax.tree.map(jnp.asarray, trees.fitted(trees.paths(store), self._first))

    def _seen(self, broadcast: wire.Message) -> tuple[bool, bytes, Any, tuple]:
        """(whether it asks for curvature, the server's run, the model, what is told and asked) of a broadcast."""
        agreement, arrays = self._agreement, broadcast.arrays
        told, asked = agreement.said
        forms = {"params": trees.select(agreement.params, agreement.parts.trainable), "told": told, "asked": asked}
        if agreement.in_turns:
            forms["due"] = jax.ShapeDtypeStruct((), bool)
        if agreement.keeps:
            forms["run"] = jax.ShapeDtypeStruct((RUN,), np.uint8)
        arrays = packing.unpacked(arrays, agreement.bits, trees.paths(forms))
        due, run = bool(np.all(arrays.get("due", True))), bytes(arrays.get("run", b""))
        if not due:
            nothing = {path: np.zeros(form.shape, form.dtype) for path, form in trees.paths({"asked": asked}).items()}
            arrays = nothing | arrays
        try:
            got = trees.fitted({path: jnp.asarray(array) for path, array in arrays.items()}, forms)
        except ValueError as error:
            raise wire.Malformed(f"its arrays: {error}") from None
        return due, run, trees.replace(agreement.params, got["params"]), (got["told"], got["asked"])


def _check_fields(data: Mapping[str, Any], example: Mapping[str, Any]) -> None:
    """Refuses examples that are not as one that was agreed on: a loss of other shapes may well be a number."""
    for name, form in example.items():
        if name not in data:
            raise ValueError(f"data: needed a field {name!r}, as in the example that was agreed on, got {sorted(data)}")
        got, numbers = np.asarray(data[name]), (jnp.integer, jnp.floating)
        alike = any(jnp.issubdtype(got.dtype, kind) and jnp.issubdtype(form.dtype, kind) for kind in numbers)
        if got.shape[1:] != form.shape or not (alike or got.dtype == form.dtype):
            raise ValueError(
                f"data: needed {form.dtype} of shape {('N', *form.shape)} in {name!r}, as in the example that was "
                f"agreed on, got {got.dtype} of {got.shape}"
            )


def arrays_of(one: Uploads, loss: Any) -> dict[str, np.ndarray]:
    """{name on the wire: array} of one client's upload and training loss.

    Of its sketch there are the pairs that are not zero.
    """
    numbers = {"num_examples": one.num_examples, "local_loss": loss, "loss": one.loss, "damping": one.damping}
    arrays = {name: np.asarray(value) for name, value in numbers.items() if value is not None}
    arrays |= {f"delta/{path}": np.asarray(leaf) for path, leaf in trees.paths(one.delta).items()}
    if isinstance(one.sketch, Diagonal | Image | Core):
        arrays[name_of(one.sketch)] = np.asarray(one.sketch.values)
    elif isinstance(one.sketch, LayerFactors):
        arrays |= {f"layers/{path}": np.asarray(half) for path, half in trees.paths(one.sketch).items()}
    elif one.sketch is not None:
        arrays |= _of_sketch(one.sketch)
    return arrays


def name_of(message: Diagonal | Image | Core) -> str:
    """What the values of a diagonal, of an image of the common basis or of a core, are called on the wire."""
    return f"{type(message).__name__.lower()}/values"


def _of_sketch(sketch: Sketch) -> dict[str, np.ndarray]:
    """{name: array} of a sketch."""
    eigenvalues = np.asarray(sketch.eigenvalues)
    kept = wire.kept_pairs(eigenvalues)
    arrays = {"rank": np.asarray(len(eigenvalues), np.int32), "eigenvalues": eigenvalues[kept]}
    arrays["basis"] = np.asarray(sketch.basis)[:, kept]
    if sketch.report is not None:
        report = {f"report/{path}": np.asarray(leaf) for path, leaf in trees.paths(sketch.report).items()}
        arrays |= report | {"report/residuals": report["report/residuals"][kept]}
    return {f"sketch/{name}": array for name, array in arrays.items()}
