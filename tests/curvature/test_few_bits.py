"""Vectors in few bits: without bias, within the bound, in the bytes that are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fipa_jax.curvature import few_bits
from fipa_jax.curvature.sketch import Sketch

SIZE, BITS = 300, 4  # a block and a part of one
VECTOR = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def scales_of(vector, bits):
    """[P], the scale of each entry's block."""
    blocks = [vector[start : start + few_bits.BLOCK] for start in range(0, vector.size, few_bits.BLOCK)]
    return np.concatenate([np.full(block.size, np.abs(block).max() / (2 ** (bits - 1) - 1)) for block in blocks])


def test_rounding_has_no_bias_and_is_off_by_less_than_a_scale():
    keys, scales = jax.random.split(jax.random.key(1), 4000), scales_of(VECTOR, BITS)
    found = np.asarray(jax.jit(jax.vmap(lambda key: few_bits.rounded(key, VECTOR, BITS)))(keys), float)
    assert np.all(np.abs(found - VECTOR) < 1.0001 * scales)
    np.testing.assert_allclose(found.mean(0), VECTOR, atol=4 * scales.max() / np.sqrt(len(keys)))
    whole = np.unique(np.round(found / scales, 3))
    assert len(whole) <= 2**BITS - 1, "so many integers are sent"


@pytest.mark.parametrize("size", [0, 255, 256, 600])
@pytest.mark.parametrize("of", [np, jnp])
def test_whole_blocks_are_turned_by_an_orthogonal_matrix_and_back(of, size):
    vector = np.random.default_rng(size).normal(size=size).astype(np.float32)
    turned = few_bits.turned(of.asarray(vector))
    whole = size // few_bits.BLOCK * few_bits.BLOCK
    np.testing.assert_array_equal(turned[whole:], vector[whole:])
    for start in range(0, whole, few_bits.BLOCK):
        block = slice(start, start + few_bits.BLOCK)
        np.testing.assert_allclose(np.linalg.norm(turned[block]), np.linalg.norm(vector[block]), rtol=1e-6)
    np.testing.assert_allclose(few_bits.turned_back(turned), vector, atol=1e-6)
    assert turned.dtype == np.float32 and isinstance(turned, type(of.asarray(vector)))


def test_turning_shares_out_one_large_entry_and_equal_ones():
    """Against a Hadamard matrix of 256 rows and signs written out."""
    ones = np.ones(few_bits.BLOCK)
    np.testing.assert_allclose(np.abs(few_bits.turned(ones)), 1)
    np.testing.assert_allclose(np.abs(few_bits.turned(256.0 * np.eye(few_bits.BLOCK)[7])), 16)
    parity = np.array([[bin(row & column).count("1") % 2 for column in range(256)] for row in range(256)])
    signs = [(-1) ** bin((place >> 4) & place & 15).count("1") for place in range(256)]
    vector = np.random.default_rng(1).normal(size=256)
    np.testing.assert_allclose(few_bits.turned(vector), (-1.0) ** parity @ (signs * vector) / 16, atol=1e-12)


def test_a_turned_block_with_few_large_entries_is_rounded_less():
    vector = np.random.default_rng(3).standard_t(2, size=512).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    plain = jax.vmap(lambda key: few_bits.rounded(key, vector, BITS))(keys)
    turned = jax.vmap(lambda key: few_bits.sent(key, vector, BITS))(keys)
    errors = [float(np.sum((np.asarray(found) - vector) ** 2)) for found in (plain, turned)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [0, 100, 256, 700])
def test_the_nearest_levels_are_those_of_least_squares(bits, size):
    """Block by block in float64; what is left out is orthogonal to what arrives."""
    vector = np.random.default_rng(size).standard_t(3, size=size).astype(np.float32)
    turned = np.asarray(few_bits.turned(vector.astype(float)))
    for start in range(0, size, few_bits.BLOCK):
        block = turned[start : start + few_bits.BLOCK]
        places = np.floor(block / (few_bits.STEPS[bits - 1] * np.sqrt(np.mean(block**2)))) + 0.5
        places = np.clip(places, 0.5 - 2 ** (bits - 1), 2 ** (bits - 1) - 0.5)
        turned[start : start + few_bits.BLOCK] = places * (block @ places) / (places @ places)
    found = np.asarray(few_bits.nearest(jnp.asarray(vector), bits))
    np.testing.assert_allclose(found, few_bits.turned_back(turned), atol=1e-4 * np.abs(vector).max(initial=0))
    np.testing.assert_allclose(found @ vector, found @ found, rtol=1e-5)
    assert not np.any(few_bits.nearest(jnp.zeros(size), bits))
    for wrong in (np.nan, np.inf):
        assert not size or np.any(~np.isfinite(few_bits.nearest(jnp.asarray(vector).at[0].set(wrong), bits)))


@pytest.mark.parametrize(("bits", "share"), [(1, 0.363), (2, 0.119), (3, 0.0374), (4, 0.0115)])
def test_of_a_gaussian_the_nearest_levels_lose_what_is_known(bits, share):
    """1 - 2 / pi with one bit, and the errors of the best uniform quantisers (Max 1960, table 2)."""
    vector = jax.random.normal(jax.random.key(0), [200 * few_bits.BLOCK])
    lost = jnp.sum((few_bits.nearest(vector, bits) - vector) ** 2) / jnp.sum(vector**2)
    np.testing.assert_allclose(lost, share, rtol=0.02)


def test_the_bytes_are_those_of_packed_integers_and_scales():
    assert few_bits.bytes_of(SIZE, BITS) == SIZE * BITS / 8 + 2 * 4
    assert few_bits.bytes_of(3, 3) == 2 + 4
    assert few_bits.bytes_of(3, 0) == 12 and few_bits.bytes_of(3, 0, 8) == 24


def test_a_zero_vector_stays_zero():
    assert not np.any(few_bits.rounded(jax.random.key(0), jnp.zeros(SIZE), BITS))


def test_the_vectors_of_a_sketch_stay_of_length_one_and_nearly_orthogonal():
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(SIZE, 3)))[0].astype(np.float32)
    basis[:, 2] = 0  # a pair that is not there
    whole = Sketch(jnp.array([3.0, 1.0, 0.0]), jnp.asarray(basis))
    sent = few_bits.in_few_bits(lambda *_: whole, 8)(jax.random.key(0), None, None)
    gram = np.asarray(sent.basis).T @ np.asarray(sent.basis)
    np.testing.assert_allclose(np.diag(gram), [1, 1, 0], atol=1e-5)
    assert np.abs(gram - np.diag(np.diag(gram))).max() < 0.01
    assert not np.array_equal(sent.basis, basis)


@pytest.mark.parametrize("bits", [1, 17])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"sketch\.bits: needs 2 to 16 bits"):
        few_bits.in_few_bits(None, bits)
