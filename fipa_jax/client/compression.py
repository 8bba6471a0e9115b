"""How does a client send its update in fewer bytes? Wrappers of a local solver: few bits, or few entries.

few_bits   each entry in some bits, rounded at random (QSGD, Alistarh et al. 2017, arXiv 1610.02132, with a scale for
           each block of entries, which is turned before, see `curvature.few_bits`). Under `mean`, with several local
           steps and a part of the clients in a round, this is FedPAQ (Reisizadeh et al. 2020, arXiv 1909.13014)
top_k      the k largest entries. What is left out stays with the client, which adds it to its next update (error
           feedback, Stich et al. 2018, arXiv 1809.07599)
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fipa_jax.client.local_solver import LocalResult, LocalSolver
from fipa_jax.curvature import few_bits
from fipa_jax.lookup import lookup

STREAM = 0xC0DE  # of the rounding, apart from the keys of the training
Compress = Callable[[jax.Array, jax.Array], jax.Array]  # (key, update [P]) -> [P], as it arrives


class Compression(NamedTuple):
    """What becomes of an update on its way; the group `local.compress` of a config."""

    name: Literal["none", "few_bits", "top_k"] = "none"
    bits: int = 8  # of an entry, for `few_bits`
    share: float = 0.01  # of the entries that `top_k` keeps


class Compressor(NamedTuple):
    """A way to send an update."""

    apply: Compress
    bytes_of: Callable[[int], int]  # P -> bytes
    keeps_rest: bool = False  # whether what is left out waits for the next update


def compressor_of(how: Compression) -> Compressor | None:
    """The compressor that the options name; None for none.

    Raises:
      ValueError: the name is not known, or a number is out of its range.
    """
    kinds = {"none": _none, "few_bits": _few_bits, "top_k": _top_k}
    return lookup(kinds, how.name, "config.local.compress.name")(how)


def _none(how: Compression) -> None:
    return None


def _few_bits(how: Compression) -> Compressor:
    few_bits.check(how.bits, "local.compress.bits")
    bytes_of = functools.partial(few_bits.bytes_of, bits=how.bits)
    return Compressor(functools.partial(few_bits.sent, bits=how.bits), bytes_of)


def _top_k(how: Compression) -> Compressor:
    if not 0 < how.share <= 1:
        raise ValueError(f"local.compress.share: needs a number above 0 and at most 1, got {how.share}")

    def kept(size: int) -> int:
        return math.ceil(how.share * size)

    def apply(key, update):
        places = jax.lax.top_k(jnp.abs(update), kept(update.size))[1]
        values = update[places].astype(jnp.float32).astype(update.dtype)
        return jnp.zeros_like(update).at[places].set(values)

    return Compressor(apply, lambda size: 8 * kept(size), keeps_rest=True)  # an int32 and a float32 for each


def compressed(local: LocalSolver, compressor: Compressor) -> LocalSolver:
    """The local solver whose update is what the server receives of it.

    Args:
      local: any; with the term `feedback`, whose store is what the client has not sent yet, where the compressor keeps
        the rest.
      compressor: see `compressor_of`.

    Example:
      compressed(local, compressor_of(Compression("few_bits", bits=8))).
    """

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        result = local(outputs, params, data, client, key, hyper, store, shared)
        update, unravel = ravel_pytree(result.delta)
        waiting = ravel_pytree(store)[0] if compressor.keeps_rest else jnp.zeros_like(update)
        sent = compressor.apply(jax.random.fold_in(key, STREAM), update + waiting)
        result = result._replace(delta=unravel(sent))
        if not compressor.keeps_rest:
            return result
        return result._replace(store=ravel_pytree(store)[1](update + waiting - sent))

    return solve
