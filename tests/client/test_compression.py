"""Updates in fewer bytes: nothing is lost that is not sent later, and what is counted is what is sent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.client.compression import Compression, compressed, compressor_of
from fipa_jax.client.local_solver import LocalResult

UPDATE = {"a": jnp.array([3.0, -1.0, 0.5]), "b": jnp.array([[0.2, -4.0]])}


def local(outputs, params, data, client, key, hyper, store, shared):
    """The same update in every round."""
    return LocalResult(UPDATE, store, jnp.zeros([]))


def sent_in(rounds, how, store):
    """(what the server receives in each round, what the client keeps at the end)."""
    solve, received = compressed(local, compressor_of(how)), []
    for k in range(rounds):
        result = solve(None, None, None, None, jax.random.key(k), None, store, ())
        received, store = [*received, result.delta], result.store
    return received, store


def test_what_top_k_leaves_out_comes_later():
    blank = jax.tree.map(jnp.zeros_like, UPDATE)
    received, left = sent_in(7, Compression("top_k", share=0.3), blank)  # 2 of 5 entries
    for k, delta in enumerate(received):
        assert sum(np.count_nonzero(leaf) for leaf in delta.values()) == 2, k
    first = {"a": [3.0, 0, 0], "b": [[0, -4.0]]}
    jax.tree.map(
        np.testing.assert_array_equal,
        received[0],
        jax.tree.map(np.asarray, first, is_leaf=lambda x: isinstance(x, list)),
    )
    for name, leaf in UPDATE.items():
        total = sum(np.asarray(delta[name]) for delta in received) + np.asarray(left[name])
        np.testing.assert_allclose(total, 7 * np.asarray(leaf), rtol=1e-6)
    assert any(np.any(delta["a"][1:] != 0) for delta in received), "small entries grow until they are sent"


def test_few_bits_leave_the_store_alone():
    received, store = sent_in(1, Compression("few_bits", bits=8), ())
    assert store == ()
    for name, leaf in UPDATE.items():
        np.testing.assert_allclose(received[0][name], leaf, atol=4 / 127)
    assert np.any(received[0]["a"] != UPDATE["a"])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_changes_lose_dies_away_where_updates_stay(bits):
    """The server adds what comes to what it keeps, the first time nothing."""
    how, update = Compression("change", bits=bits), jax.flatten_util.ravel_pytree(UPDATE)[0]
    last, errors = jax.tree.map(jnp.zeros_like, UPDATE), [float(jnp.linalg.norm(update))]
    for _ in range(6):
        received, store = sent_in(1, how, last)
        jax.tree.map(np.testing.assert_array_equal, store, last)  # the server's rule writes it: `Term.remember`
        last = received[0]
        errors.append(float(jnp.linalg.norm(jax.flatten_util.ravel_pytree(last)[0] - update)))
    for before, after in itertools.pairwise(errors):
        assert after < 0.9 * before
    assert errors[-1] < 0.1 * errors[0]


def test_the_bytes():
    assert compressor_of(Compression("change", bits=4)).bytes_of(1000) == 500 + 4 * 4
    assert compressor_of(Compression("top_k", share=0.01)).bytes_of(1000) == 10 * 8
    assert compressor_of(Compression("few_bits", bits=8)).bytes_of(1000) == 1000 + 4 * 4
    assert compressor_of(Compression()) is None


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Compression("zip"), "config.local.compress.name"),
        (Compression("few_bits", bits=1), "local.compress.bits: needs 2 to 16"),
        (Compression("change", bits=9), "local.compress.bits: 'change' needs 1 to 8 bits, got 9"),
        (Compression("top_k", share=0.0), "local.compress.share: needs a number above 0"),
    ],
)
def test_mistakes_are_named(how, words):
    with pytest.raises(ValueError, match=words):
        compressor_of(how)
