"""How else may a cohort be sketched? Wrappers of a `Sketcher`.

On random views, from one start for all clients, seldom (by few of the cohort, so that most send no curvature), within
a budget of bytes, or within what a link carries in time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fipa_jax import trees
from fipa_jax.curvature import contracts
from fipa_jax.curvature.common_basis import Core
from fipa_jax.curvature.sketch import Sketch, Sketcher, truncate

BYTES_OF_MBIT = 125_000
Augment = Callable[[jax.Array, Any], Any]  # (key, batch) -> a random view of the batch


def on_views(sketcher: Sketcher, augment: Augment) -> Sketcher:
    """The sketcher on a random view of each example, as the clients train on, instead of the example itself.

    The authors of FIPA sketch what their training loader gives, augmented images.

    Example:
      on_views(sketcher, task.augment).

    Args:
      sketcher: of examples as they are.
      augment: (key, batch) -> a view.
    """

    def of_client(outputs, params, key, batch, mask, *asked):
        view_key, key = jax.random.split(key)
        return sketcher.of_client(outputs, params, key, augment(view_key, batch), mask, *asked)

    return sketcher._replace(of_client=of_client)


def from_one_start(sketcher: Sketcher) -> Sketcher:
    """The sketcher with the same random numbers for all clients of a round: iterative solvers begin alike.

    The authors of FIPA draw one start for all clients, by the number of the round. What else is random, such as views
    or the examples that are sketched, is drawn alike too, of each client's own examples.
    """
    return sketcher._replace(drawn_by=jnp.zeros_like)


def sent_seldom(
    sketcher: Sketcher, share: float, *, full: int = 1, start: int = 0, scaled: bool = True, least: int = 0
) -> Sketcher:
    """The sketcher of which in a round only a part of the cohort is asked; all others send no pair and do no work.

    In each of the first `full` rounds everybody sends a sketch. Then `share` of all do, their number in a round as even
    as whole numbers can be (with 5 clients and a share of 0.1 one client in every second round); which of the cohort
    they are is drawn anew. The message of whoever sends none is zero, its report too.

    Example:
      sent_seldom(plain(make), 0.1).due(jnp.int32(0), key, jnp.arange(5)) is five times True.

    Args:
      sketcher: gives sketches, or cores, which are never scaled.
      share: p, of the cohort that sends a sketch in the mean over the later rounds; above 0, at most 1.
      full: rounds.
      start: the number of the phase's first round.
      scaled: whether eigenvalues come divided by p, so that the mean of what arrives, zeros included, is that of all
        clients' curvature. A rule that takes the mean over those who have sent needs them as they are.
      least: clients of a round that are asked even so; with `scaled`, 0.

    Raises:
      ValueError: the share is not in (0, 1]; a least number of clients whose sketches are scaled.
    """
    if not 0 < share <= 1:
        raise ValueError(f"sketch.share: needs a number above 0 and at most 1, got {share}")
    if scaled and least:
        raise ValueError(f"least: with scaled sketches needs 0, as their mean would not be that of all, got {least}")
    contracts.at_least(0, full=full)

    def of_cohort(messages, round):
        sketches = sketcher.of_cohort(messages, round)
        if isinstance(sketches, Core):
            return sketches
        if not isinstance(sketches, Sketch):
            raise ValueError(f"sketch.share: needs sketches or cores, got {type(sketches).__name__}")
        scale = jnp.where(round - start < full, 1, 1 / share) if scaled else jnp.ones([])
        return sketches._replace(eigenvalues=sketches.eigenvalues * scale.astype(sketches.eigenvalues.dtype))

    return sketcher._replace(of_cohort=of_cohort, due=functools.partial(due, share, full, start, least))


def due(share: float, full: int, start: int, least: int, round: jax.Array, key: jax.Array, ids: jax.Array) -> jax.Array:
    """[C] bool: which of the clients `ids` [C] send a sketch in a round, see `sent_seldom`; the key is the round's."""
    clients, after = ids.shape[0], jnp.maximum(round - start - full, -1)
    until = jnp.floor(clients * share * jnp.stack([after, after + 1]) + 0.5)
    number = jnp.where(after < 0, clients, jnp.maximum(until[1] - until[0], least))
    lots = jax.vmap(lambda id_: jax.random.uniform(jax.random.fold_in(key, id_)))(ids)
    return jnp.argsort(jnp.argsort(lots)) < number


def within_budget(sketcher: Sketcher, budget: float, start: int = 0) -> Sketcher:
    """The sketcher of whose pairs only those are sent that so many bytes a client and round pay for, the best first.

    Every client that is asked says its eigenvalues, and how good they are; then the cohort's largest are asked for, as
    many pairs as the bytes buy that are left. A pair's gain, log(1 + lam / beta) of the precision that it brings, and
    its price are such that this is where the gain of another pair would be the same for all clients (water-filling).
    What a round leaves over, less than a pair, the next one may spend. At most the sketcher's rank comes from one.

    Args:
      sketcher: gives sketches; of `sent_seldom`, if that is asked for too, it is inside: a client that is asked may
        then send as much as if all were.
      budget: bytes for curvature, a client and round; above 0.
      start: the number of the phase's first round.

    Raises:
      ValueError: the budget is not above 0; in a round, it does not pay for the eigenvalues.
    """
    if not budget > 0:
        raise ValueError(f"sketch.budget: needs more than 0 bytes, got {budget}")

    def of_cohort(messages, round):
        sketches = sketcher.of_cohort(messages, round)
        if not isinstance(sketches, Sketch):
            raise ValueError(f"sketch.budget: needs sketches, got {type(sketches).__name__}")
        values = sketches.eigenvalues
        keep = _largest(values, pairs_for(sketcher, sketches, budget, round - start))
        return jax.vmap(truncate)(sketches, keep)

    return sketcher._replace(of_cohort=of_cohort, says_first=True)


def pairs_for(sketcher: Sketcher, sketches: Sketch, budget: float, round: jax.Array) -> jax.Array:
    """[] int32: the pairs that a cohort's budget pays for in the phase's round, of stacked sketches [C, ...].

    Raises:
      ValueError: it does not pay for the eigenvalues.
    """
    clients, (asked, price) = sketches.eigenvalues.shape[0], _bytes_of(sketcher, sketches)
    if budget <= asked:
        raise ValueError(f"sketch.budget: eigenvalues and report take {asked} bytes already, got {budget}")
    bought = clients * (budget - asked) / price  # a round
    until = jnp.floor(bought * jnp.stack([round, round + 1]))
    return (until[1] - until[0]).astype(jnp.int32)


def within_link(sketcher: Sketcher, rate: float, seconds: float, update_bytes: Callable[[int], int]) -> Sketcher:
    """The sketcher of whose pairs a client sends at most those that its link carries in time, the largest first.

    Unlike a budget, which is the cohort's, it bounds each client, and nothing is said before. The update goes first.
    Headers of messages, single numbers and the link's latency are not counted.

    Example:
      within_link(plain(make), 1.0, 2.0, lambda size: 4 * size)   # 250 kB a client and round

    Args:
      sketcher: gives sketches.
      rate: of a client's uplink, in Mbit/s (10^6 bits a second); above 0.
      seconds: for all that it sends in a round; above 0.
      update_bytes: P -> the bytes of its update.

    Raises:
      ValueError: a number is not above 0; in a round, the update and one pair take longer.
    """
    check_link(rate, seconds)
    most = BYTES_OF_MBIT * rate * seconds

    def of_cohort(messages, round):
        sketches = sketcher.of_cohort(messages, round)
        if not isinstance(sketches, Sketch):
            raise ValueError(f"sketch.link: needs sketches, got {type(sketches).__name__}")
        size, itemsize = sketches.basis.shape[1], sketches.basis.dtype.itemsize
        update = update_bytes(size) + (itemsize * size if sketcher.sends_gradient else 0)
        pairs = pairs_within(sketcher, sketches, most, update)
        report = sketches.report
        if report is not None:
            report = report._replace(residuals=report.residuals[:, :pairs])
        return Sketch(sketches.eigenvalues[:, :pairs], sketches.basis[:, :, :pairs], report)

    return sketcher._replace(of_cohort=of_cohort)


def check_link(rate: float, seconds: float) -> None:
    """Refuses, with a ValueError, a link without a rate or a deadline, see `within_link`."""
    for name, value in {"link": rate, "deadline": seconds}.items():
        if not value > 0:
            raise ValueError(f"sketch.{name}: a link and a deadline go together, needs a number above 0, got {value}")


def pairs_within(sketcher: Sketcher, sketches: Sketch, most: float, update: int) -> int:
    """The pairs that `most` bytes of one client hold beside its `update` of so many, of stacked sketches [C, R, ...].

    Raises:
      ValueError: not one.
    """
    said, vector = _bytes_of(sketcher, sketches)
    clients, rank = sketches.eigenvalues.shape
    numbers = [sketches.eigenvalues] + ([] if sketches.report is None else [sketches.report.residuals])
    pair = vector + trees.nbytes(numbers) // (clients * rank)
    fixed = update + said - trees.nbytes(numbers) // clients
    if most < fixed + pair:
        raise ValueError(
            f"sketch.deadline: until then the link carries {most:,.0f} bytes; update and report take {fixed:,}, an "
            f"eigenpair {pair:,}. Allow more seconds, or send fewer bits (local.compress, sketch.bits)"
        )
    return int(min((most - fixed) // pair, rank))


def _bytes_of(sketcher: Sketcher, sketches: Sketch) -> tuple[int, int]:
    """(the bytes of one client's eigenvalues and report, those of one eigenvector) of stacked sketches [C, ...]."""
    said = trees.nbytes((sketches.eigenvalues, sketches.report)) // sketches.eigenvalues.shape[0]
    size = sketches.basis.shape[1]
    return said, sketcher.vector_bytes(size) if sketcher.vector_bytes else sketches.basis.dtype.itemsize * size


def _largest(values: jax.Array, number: jax.Array) -> jax.Array:
    """[C, R] bool: the `number` largest of values [C, R]."""
    places = jnp.argsort(jnp.argsort(-values.reshape(-1)))
    return (places < number).reshape(values.shape)
