"""How are a client's examples looked at, some at a time? Micro-batches, and loops over those that hold examples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax.curvature import contracts
from fipa_jax.derivatives import vary_with

Add = Callable[..., Any]  # (total, batch, weight [B], *others) -> total


class MicroBatches(NamedTuple):
    """A client's examples, so many at a time; padding repeats examples that are there, and weighs nothing."""

    batch: Any  # leaves [n, B, ...]
    weight: jax.Array  # [n, B], 1/N for the examples that are there
    count: jax.Array | None  # [] int32, micro-batches up to the last example that is there; None without a mask: all


def weights_of(params, batch, mask):
    """[N], 1/N for the examples that are there; an empty client has H = 0."""
    mask = jnp.ones([contracts.num_examples(batch)], bool) if mask is None else mask
    dtype = ravel_pytree(params)[0].dtype
    return mask.astype(dtype) / jnp.maximum(jnp.sum(mask), 1).astype(dtype)


def micro_batches(params, batch, mask, size) -> MicroBatches:
    """The batch [N, ...] cut into micro-batches of so many examples; 0 for one of all.

    Raises:
      ValueError: the batch, or the mask, is none; see `contracts`.
    """
    batch, mask = contracts.present_rows(batch, mask)
    weight = weights_of(params, batch, mask)
    size = size or weight.shape[0]

    def split(x, mode):  # [N, ...] -> [n, size, ...]
        padded = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1), mode=mode)
        return padded.reshape(-1, size, *x.shape[1:])

    weights = split(weight, "constant")
    occupied = jnp.any(weights > 0, axis=1)
    count = None
    if mask is not None:
        count = jnp.max(jnp.where(occupied, 1 + jnp.arange(occupied.shape[0], dtype=jnp.int32), 0))
    # Never an input the network has not seen, not even as padding: its derivatives may not be finite.
    return MicroBatches(jax.tree.map(lambda x: split(x, "edge"), batch), weights, count)


def fold(add: Add, total, micro: MicroBatches, *others):
    """total <- add(total, batch, weight, *others) over the micro-batches that hold examples, one after another.

    With a mask it has no reverse-mode derivative, as the number of steps is the data's; `fold_all` has.

    Args:
      others: what goes with each micro-batch, leaves [n, ...].
    """
    total = vary_with(total, micro, others)

    def body(i, total):
        stacked = (micro.batch, micro.weight, *others)
        return add(total, *jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacked))

    if micro.weight.shape[0] == 1:  # no loop: what does not change can be lifted out of a solver's own
        return body(0, total)
    steps = micro.weight.shape[0] if micro.count is None else _most(micro.count)
    return jax.lax.fori_loop(0, steps, body, total)


def fold_all(add: Add, total, micro: MicroBatches):
    """`fold` over all micro-batches, each computed anew by the reverse sweep of a derivative."""

    def body(total, one):
        return add(total, *one), None

    stacked = micro.batch, micro.weight
    return jax.lax.scan(jax.checkpoint(body), vary_with(total, micro), stacked)[0]


def stack(function: Callable[[Any, jax.Array], Any], micro: MicroBatches):
    """function(batch, weight) of the micro-batches that hold examples, leaves [n, ...]; zero for those behind them."""
    shapes = jax.eval_shape(function, *first((micro.batch, micro.weight)))
    empty = jax.tree.map(lambda x: jnp.zeros([micro.weight.shape[0], *x.shape], x.dtype), shapes)

    def put(stacked, batch, weight, i):
        return jax.tree.map(lambda x, y: x.at[i].set(y), stacked, function(batch, weight))

    return fold(put, empty, micro, jnp.arange(micro.weight.shape[0]))


def zero_if_empty(micro: MicroBatches, value):
    """A sum over the examples that are there; 0 where none is, whatever the network has made of those that are not."""
    if micro.count is None:
        return value
    there = micro.count > 0
    return jax.tree.map(lambda x: jnp.where(there, x, jnp.zeros((), x.dtype)), value)


def first(stacked):
    """Row 0 of every leaf."""
    return jax.tree.map(lambda x: x[0], stacked)


@jax.custom_batching.custom_vmap
def _most(count):
    """The count itself; of clients side by side the largest one.

    A loop whose length differs among them would select between the old and the new value of all that it carries, in
    each step: of the rows of all micro-batches. The further steps add nothing, since their examples weigh nothing.
    """
    return count


@_most.def_vmap
def _most_of_all(axis_size, in_batched, count):
    return jnp.max(count), False
