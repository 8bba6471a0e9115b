"""How does a client send its update in fewer bytes? Wrappers of a local solver: few bits, or few entries.

few_bits   each entry in some bits, rounded at random (QSGD, Alistarh et al. 2017, arXiv 1610.02132, with a scale for
           each block of entries, which is turned before, see `curvature.few_bits`). Under `mean`, with several local
           steps and a part of the clients in a round, this is FedPAQ (Reisizadeh et al. 2020, arXiv 1909.13014)
change     the change since the client's last update, each entry at the nearest of few levels; the server, which keeps
           that, adds it (EF21, Richtarik et al. 2021, arXiv 2106.05203). What is lost shrinks with the change
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
# (key, update [P], the client's store [P]) -> (the update as it arrives [P], the store [P])
Compress = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Compression(NamedTuple):
    """What becomes of an update on its way; the group `local.compress` of a config."""

    name: Literal["none", "few_bits", "change", "top_k"] = "none"
    bits: int = 8  # of an entry, for `few_bits`, 2 to 16, and `change`, 1 to 8
    share: float = 0.01  # of the entries that `top_k` keeps


class Compressor(NamedTuple):
    """A way to send an update."""

    apply: Compress
    bytes_of: Callable[[int], int]  # P -> bytes
    term: str = ""  # whose store it goes by, see `client.terms`; "" for any, whose store stays as it is


def compressor_of(how: Compression) -> Compressor | None:
    """The compressor that the options name; None for none.

    Raises:
      ValueError: the name is not known, or a number is out of its range.
    """
    kinds = {"none": _none, "few_bits": _few_bits, "change": _change, "top_k": _top_k}
    return lookup(kinds, how.name, "config.local.compress.name")(how)


def _none(how: Compression) -> None:
    return None


def _few_bits(how: Compression) -> Compressor:
    few_bits.check(how.bits, "local.compress.bits")

    def apply(key, update, store):
        return few_bits.sent(key, update, how.bits), store

    return Compressor(apply, functools.partial(few_bits.bytes_of, bits=how.bits))


def _change(how: Compression) -> Compressor:
    if not 1 <= how.bits <= len(few_bits.STEPS):
        raise ValueError(f"local.compress.bits: 'change' needs 1 to {len(few_bits.STEPS)} bits, got {how.bits}")

    def apply(key, update, last):
        return last + few_bits.nearest(update - last, how.bits), last  # the server remembers what arrives

    return Compressor(apply, functools.partial(few_bits.bytes_of, bits=how.bits), term="varp")


def _top_k(how: Compression) -> Compressor:
    if not 0 < how.share <= 1:
        raise ValueError(f"local.compress.share: needs a number above 0 and at most 1, got {how.share}")

    def kept(size: int) -> int:
        return math.ceil(how.share * size)

    def apply(key, update, waiting):
        whole = update + waiting
        places = jax.lax.top_k(jnp.abs(whole), kept(whole.size))[1]
        values = whole[places].astype(jnp.float32).astype(whole.dtype)
        arrives = jnp.zeros_like(whole).at[places].set(values)
        return arrives, whole - arrives

    return Compressor(apply, lambda size: 8 * kept(size), term="feedback")  # an int32 and a float32 for each


def compressed(local: LocalSolver, compressor: Compressor) -> LocalSolver:
    """The local solver whose update is what the server receives of it.

    Args:
      local: any; with the term whose store the compressor goes by, if there is one.
      compressor: see `compressor_of`.

    Example:
      compressed(local, compressor_of(Compression("few_bits", bits=8))).
    """

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        result = local(outputs, params, data, client, key, hyper, store, shared)
        update, unravel = ravel_pytree(result.delta)
        kept, unravel_store = ravel_pytree(store) if compressor.term else (jnp.zeros_like(update), None)
        arrives, kept = compressor.apply(jax.random.fold_in(key, STREAM), update, kept)
        result = result._replace(delta=unravel(arrives))
        return result._replace(store=unravel_store(kept)) if unravel_store else result

    return solve
