"""How else may a cohort be sketched? Wrappers of a `Sketcher`.

On random views, from one start for all clients, seldom (by few of the cohort, so that most send no curvature), within
a budget of bytes, or within what a link carries in time.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax import trees
from fipa_jax.curvature import contracts, few_bits
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


def above_level(sketcher: Sketcher, budget: float) -> Sketcher:
    """The sketcher of whose pairs those are sent that reach the level which the server announces.

    It is the clients' part of `aggregate.within_budget`. Where the level is 0 there is none yet, and a client sends its
    largest pairs, as many as its own bytes buy, one at least.

    Args:
      sketcher: gives sketches.
      budget: bytes of curvature, a client and round; above 0.

    Raises:
      ValueError: the budget is not above 0, or not finite; in a round, it buys no more than the report.
    """
    check_budget(budget)

    def of_client(outputs, params, key, batch, mask, *asked):
        *others, level = asked
        return sketcher.of_client(outputs, params, key, batch, mask, *others), level

    def of_cohort(messages, round):
        sketches, levels = sketcher.of_cohort(messages[0], round), messages[1][:, None]
        if not isinstance(sketches, Sketch):
            raise ValueError(f"sketch.budget: needs sketches, got {type(sketches).__name__}")
        values, first = sketches.eigenvalues, pairs_bought(sketches, budget, sketcher.bits)
        keep = jnp.where(levels > 0, values >= levels, jnp.arange(values.shape[1]) < first)
        return jax.vmap(truncate)(sketches, keep)

    return sketcher._replace(of_client=of_client, of_cohort=of_cohort)


def check_budget(budget: float) -> None:
    """Refuses, with a ValueError, a budget that is no finite number above 0, see `above_level`; a traced one passes."""
    if not contracts.is_known(budget):
        return
    number = np.asarray(budget)
    if not (number.shape == () and jnp.issubdtype(number.dtype, jnp.number) and 0 < number < np.inf):
        raise ValueError(f"sketch.budget: needs more than 0 bytes, a finite number, got {budget!r}")


def pairs_bought(sketch: Sketch, budget: float, bits: int) -> int:
    """The whole pairs that `budget` bytes of one client buy, of its sketch or stacked ones: from one to all.

    Raises:
      ValueError: there is nothing left beside the report.
    """
    report, pair = prices(sketch, bits)
    if budget <= report:
        raise ValueError(f"sketch.budget: {budget:g} bytes, of which a client's report alone takes {report}")
    return int(min(max((budget - report) // pair, 1), sketch.eigenvalues.shape[-1]))


def prices(sketch: Sketch, bits: int) -> tuple[int, int]:
    """(the bytes of a client's report, those of a pair with its residual), of one sketch or stacked ones [C, ...]."""
    size, rank = sketch.basis.shape[-2:]
    clients = sketch.eigenvalues.size // rank
    pair = few_bits.bytes_of(size, bits, sketch.basis.dtype.itemsize) + sketch.eigenvalues.dtype.itemsize
    if sketch.report is None:
        return 0, pair
    residuals = trees.nbytes(sketch.report.residuals)
    return (trees.nbytes(sketch.report) - residuals) // clients, pair + residuals // (clients * rank)


def are_sent(sketches: Sketch) -> jax.Array:
    """[C] bool: which of stacked sketches [C, ...] a client has sent, if only to say that it keeps no pair.

    Who was not asked has sent zeros alone. Without reports only those with a pair show.
    """
    leaves = jax.tree.leaves((sketches.eigenvalues, sketches.report))
    return jnp.any(jnp.stack([jnp.any(leaf.reshape(leaf.shape[0], -1) != 0, axis=1) for leaf in leaves]), axis=0)


def within_link(sketcher: Sketcher, rate: float, seconds: float, update_bytes: Callable[[int], int]) -> Sketcher:
    """The sketcher of whose pairs a client sends at most those that its link carries in time, the largest first.

    Unlike a budget, a mean of clients and rounds, it bounds each client in each round. The update goes first.
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
    report, pair = prices(sketches, sketcher.bits)
    fixed = update + report
    if most < fixed + pair:
        raise ValueError(
            f"sketch.deadline: until then the link carries {most:,.0f} bytes; update and report take {fixed:,}, an "
            f"eigenpair {pair:,}. Allow more seconds, or send fewer bits (local.compress, sketch.bits)"
        )
    return int(min((most - fixed) // pair, sketches.eigenvalues.shape[1]))
