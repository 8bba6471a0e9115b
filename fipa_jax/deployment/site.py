"""What does a client of a real federation do? It answers a broadcast by what it has made of it beside its own data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import trees
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.client.examples import Client
from fipa_jax.curvature.common_basis import Core, Image
from fipa_jax.curvature.layer_factors import LayerFactors
from fipa_jax.curvature.sketch import Diagonal, Sketch
from fipa_jax.deployment import packing, wire
from fipa_jax.deployment.agreement import Agreement, broadcast_of, client_state, first_rule, first_store, work_of
from fipa_jax.federation.population import Cohort
from fipa_jax.saving.model_files import export, load


class Kept(NamedTuple):
    """What a client's term keeps."""

    round: Any  # [] int32, that it has answered last
    before: Any  # [1, ...], before that round
    after: Any  # [1, ...]


class Site:
    """A client beside its data. Between two rounds it keeps compiled programs, and what its term keeps.

    A broadcast that comes again is answered as before: what the term has kept in a round counts from the next one on.
    The server does not say whose answer came too late, so that an update that is lost counts as sent.

    Example:
      site = Site(agreement, client=2, data={"x": x, "y": y})
      upload = site.work(broadcast)

    Args:
      agreement: the federation's.
      client: its number, from 0.
      data: {field: [N, ...]}, its own examples.
      width: to how many examples its draws are padded, N or more; 0 for N. A simulation pads to its largest client: the
        same width draws the same batches.
      memory: a file that keeps what its term keeps, where the process may be started anew (`feedback`, `moon`); None
        for none.

    Raises:
      ValueError: there is no such client, or fields differ in their lengths; the file is another model's, or damaged.
    """

    def __init__(
        self,
        agreement: Agreement,
        client: int,
        data: Mapping[str, Any],
        width: int = 0,
        memory: str | Path | None = None,
    ):
        if not 0 <= client < agreement.parts.num_clients:
            raise ValueError(f"client: needed 0 to {agreement.parts.num_clients - 1}, got {client}")
        lengths = {len(field) for field in data.values()}
        if len(lengths) != 1 or not all(lengths):
            raise ValueError(f"data: needed as many examples in each field, one at least, got {sorted(lengths)}")
        self._agreement, self._client, (number,) = agreement, client, lengths
        indices = np.zeros([1, max(width, number)], np.int32)
        indices[0, :number] = np.arange(number)
        with agreement.precision():
            clients = Client(jnp.asarray(indices), jnp.asarray([number], jnp.int32))
            rows = np.minimum(np.arange(indices.shape[1]), number - 1)  # sites of the same width share a program
            fields = {name: jnp.asarray(np.asarray(field)[rows]) for name, field in data.items()}
            self._cohort = Cohort(jnp.asarray([client], jnp.int32), clients, fields)
            first = first_store(agreement, agreement.params)
            self._kept, self._file = Kept(np.int32(wire.NOBODY), first, first), memory and Path(memory)
            if jax.tree.leaves(first) and self._file and self._file.is_file():
                self._kept = Kept(**load(self._file, self._kept._asdict()))

    def work(self, blob: bytes) -> bytes:
        """The upload that answers a broadcast.

        Raises:
          wire.Malformed: it is none, or of a federation with other parameters.
        """
        broadcast = wire.expect(blob, "broadcast", self._agreement.fingerprint)
        agreement = self._agreement
        with agreement.precision():
            before = self._kept.before if broadcast.round == self._kept.round else self._kept.after
            due, state = self._seen(broadcast, before)
            uploads, loss, store = work_of(
                agreement.of_clients(due), state, agreement.rates, self._cohort, agreement.root
            )
            one, loss = jax.tree.map(lambda leaf: np.asarray(leaf)[0], (uploads, loss))
            self._keep(Kept(np.int32(broadcast.round), before, store))
        arrays = packing.packed(arrays_of(one, loss), agreement.bits)
        return wire.pack(wire.Message("upload", broadcast.fingerprint, broadcast.round, self._client, arrays))

    def warm_up(self) -> None:
        """Compiles what rounds need, by one of each kind on the first model: the first message need not wait for it."""
        agreement = self._agreement
        with agreement.precision():
            rule = first_rule(agreement.parts, agreement.params)
            kinds = [
                broadcast_of(agreement, agreement.params, rule, 0, due)
                for due in (True, False)[: 1 + agreement.in_turns]
            ]
        kept, file, self._file = self._kept, self._file, None
        for blob in kinds:
            self.work(blob)
        self._kept, self._file = kept, file

    def _keep(self, kept: "Kept") -> None:
        """Remembers what the term keeps, in the file too."""
        self._kept = kept
        if self._file and jax.tree.leaves(kept.after):
            export(self._file, kept._asdict())

    def _seen(self, broadcast: wire.Message, store: Any):
        """(whether it asks for curvature, the state as it tells it) of a broadcast, for a client that keeps `store`."""
        agreement, arrays = self._agreement, broadcast.arrays
        told, asked = agreement.said
        forms = {"params": trees.select(agreement.params, agreement.parts.trainable), "told": told, "asked": asked}
        if agreement.in_turns:
            forms["due"] = jax.ShapeDtypeStruct((), bool)
        arrays = packing.unpacked(arrays, agreement.bits, trees.paths(forms))
        due = bool(np.all(arrays.get("due", True)))
        if not due:
            nothing = {path: np.zeros(form.shape, form.dtype) for path, form in trees.paths({"asked": asked}).items()}
            arrays = nothing | arrays
        try:
            got = trees.fitted({path: jnp.asarray(array) for path, array in arrays.items()}, forms)
        except ValueError as error:
            raise wire.Malformed(f"its arrays: {error}") from None
        params = trees.replace(agreement.params, got["params"])
        said = got["told"], got["asked"]
        return due, client_state(agreement, params, said, jnp.int32(broadcast.round), store)


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
