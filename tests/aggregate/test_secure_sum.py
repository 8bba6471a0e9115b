"""Fixed point under masks: the sum is exact to the grid, and one client's message says nothing by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.aggregate import secure_sum
from fipa_jax.aggregate.secure_sum import decode, encode, grid_of, mask, public_bound, total_of, unmask

CLIENTS, SIZE = 5, 4000
ROOT = jax.random.key(3)
_total = jax.jit(total_of, static_argnums=1)


def _values(scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(CLIENTS, SIZE))


@functools.partial(jax.jit, static_argnames="bits")
def _words(values, bits):
    """(each client's words [C, P], the grid)."""
    bound = public_bound(values)
    grid = grid_of(bound, len(values), bits)
    return jax.vmap(lambda one: encode(one, bound, grid, bits))(values), grid


@pytest.mark.parametrize("bits", [16, pytest.param(24, marks=pytest.mark.slow), 32])
def test_the_sum_under_masks_is_exact_to_the_grid(x64, bits):
    """In whole numbers, by NumPy, of numbers rounded to the grid one by one; and near the sum itself."""
    values = _values(3.0)
    words, grid = _words(values, bits)
    masked = _masked(words, bits)
    total = decode(unmask(masked, bits), grid, bits, jnp.float64)
    multiples = np.round(values / float(grid)).astype(np.int64)
    np.testing.assert_array_equal(total, multiples.sum(axis=0) * float(grid))
    assert np.max(np.abs(total - values.sum(axis=0))) <= CLIENTS / 2 * float(grid)
    np.testing.assert_array_equal(total, _total(values, bits))  # what a run adds up without masks
    assert float(grid) < 4 * CLIENTS * np.abs(values).max() / 2 ** (bits - 1)


@functools.partial(jax.jit, static_argnames="bits")
def _masked(words, bits):
    """What each client sends."""
    return [mask(words[place], place, CLIENTS, ROOT, bits) for place in range(CLIENTS)]


def _surprise(words, bits):
    """Pearson's statistic of the words' upper and lower four bits, as standard deviations from that of uniform ones."""
    found = []
    for shift in (bits - 4, 0):
        counts = np.bincount((np.asarray(words) >> shift) & 15, minlength=16)
        expected = words.size / 16
        found.append((np.sum((counts - expected) ** 2 / expected) - 15) / np.sqrt(30))
    return max(found)


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 32])
def test_one_message_is_not_to_be_told_from_uniform_words(bits):
    """At a level of about 1e-3: a statistic of 15 degrees of freedom is above 5 deviations (42) 2e-4 of the time.

    Twice in each message of two kinds, of which one is as far from uniform as can be: all zeros.
    """
    normal, _ = _words(_values().astype(np.float32), bits)
    for words in (normal, jnp.zeros_like(normal)):
        assert _surprise(words[1], bits) > 100  # bare words are not uniform, so that the test can fail
        assert _surprise(_masked(words, bits)[1], bits) < 5


def test_masks_differ_between_pairs_and_cancel_only_together():
    nothing = jnp.zeros([CLIENTS, SIZE], jnp.uint32)
    masks = [np.asarray(words) for words in _masked(nothing, 32)]
    assert not np.any(np.sum(masks, axis=0, dtype=np.uint32))
    for left_out in range(CLIENTS):
        rest = np.sum(np.delete(masks, left_out, axis=0), axis=0, dtype=np.uint32)
        assert _surprise(rest, 32) < 5


def test_who_drops_out_after_the_masks_is_not_recovered():
    words, _ = _words(_values().astype(np.float32), 32)
    masked = _masked(words, 32)
    with pytest.raises(ValueError, match=r"the clients \[2\] dropped out .* must begin again without them"):
        unmask([*masked[:2], None, *masked[3:]])


def test_the_order_of_the_clients_changes_no_bit():
    values = jnp.asarray(_values().astype(np.float32))
    for bits in (24, 32):
        np.testing.assert_array_equal(_total(values, bits), _total(values[::-1], bits))


def test_whole_numbers_and_zeros_stay_what_they_are():
    counts = {"weight": jnp.asarray([3.0, 50.0, 7.0], jnp.float32), "nothing": jnp.zeros([3, 2], jnp.float32)}
    total = _total(counts, 24)
    assert total["weight"] == 60 and not np.any(total["nothing"])


def test_what_has_no_words_is_refused_or_zero():
    with pytest.raises(ValueError, match="bits: needs 0 for floating point, or 8 to 32"):
        total_of(jnp.ones([2, 3]), 7)
    with pytest.raises(ValueError, match="8 bits have no room for the sum of 100 clients"):
        total_of(jnp.ones([100, 3]), 8)
    bound = jnp.float32(4)
    grid = grid_of(bound, 2, 16)
    words = encode(jnp.asarray([jnp.nan, jnp.inf, 9.0], jnp.float32), bound, grid, 16)
    np.testing.assert_array_equal(decode(words, grid, 16, jnp.float32), [0, 0, 4])
    assert secure_sum.MOST_BITS == 32


def test_one_clients_nan_or_infinity_counts_as_zero_and_the_others_count():
    for fault in (np.nan, np.inf):
        total = _total(jnp.array([[1.0, 2.0], [fault, 3.0], [1.0, 1.0]]), 16)
        np.testing.assert_allclose(total, [2, 6], atol=1e-2)
