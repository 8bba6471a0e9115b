"""Clipping, noise and whitening, against dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fipa_jax.curvature.sketch import Sketch
from fipa_jax.privacy import mechanism

SIZE = 6
NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e30, 3.4e38, 1e-45, 0.0, -0.0])
)
CLIP = jax.jit(mechanism.clipped)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mechanism.smat(jnp.ones(1), 3), r"vector: needed shape \(6,\)"),
        (lambda: mechanism.svec(jnp.ones([2, 3])), r"matrix: needed shape \[s, s\]"),
        (lambda: noisy_sum(present=jnp.ones(1, bool)), r"rows: needed shape \[C, P\] and present \[C\]"),
        (lambda: noisy_sum(bound=-1.0), "bound: "),
        (lambda: noisy_sum(noise=-1.0), "noise: "),
    ],
)
def test_what_would_be_another_sum_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def noisy_sum(**changes):
    given = {"rows": jnp.ones([4, 3]), "present": jnp.ones(4, bool), "bound": 1.0, "noise": 1.0}
    return mechanism.noisy_sum(jax.random.key(0), **given | changes)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(NUMBERS, min_size=SIZE, max_size=SIZE), st.sampled_from([1e-3, 0.3, 1.0, 50.0]))
def test_no_vector_is_longer_than_the_bound_once_it_is_clipped(entries, bound):
    vector = np.array(entries, np.float32)
    clipped = np.asarray(CLIP(vector, bound), np.float64)
    assert np.all(np.isfinite(clipped)) and np.linalg.norm(clipped) <= np.float32(bound)
    if not np.all(np.isfinite(vector)):
        assert not clipped.any()
    elif np.linalg.norm(vector.astype(float)) < 0.999 * bound:
        np.testing.assert_array_equal(clipped, vector)
    elif vector.any():
        cosine = clipped @ vector.astype(float) / np.linalg.norm(clipped) / np.linalg.norm(vector.astype(float))
        assert cosine > 1 - 1e-5 and np.linalg.norm(clipped) > 0.998 * bound


def test_one_client_more_or_less_moves_a_sum_by_the_bound_at_most():
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(5, SIZE)).astype(np.float32) * np.array([[1e-3], [1], [1e30], [np.nan], [10]])
    present = np.array([True, True, True, True, False])
    total = jax.jit(lambda rows, present: mechanism.noisy_sum(jax.random.key(0), rows, present, 0.5, 2.0))
    with_all = np.asarray(total(rows.astype(np.float32), present), np.float64)
    for client in range(5):
        others = present.copy()
        others[client] ^= True
        without = np.asarray(total(rows.astype(np.float32), others), np.float64)
        assert np.linalg.norm(with_all - without) <= 0.5 * (1 + 1e-5)  # the same noise in both


def test_the_noise_is_of_the_multiplier_times_the_bound():
    blank = jnp.zeros([2, 40_000])
    noise = np.asarray(mechanism.noisy_sum(jax.random.key(1), blank, jnp.zeros(2, bool), 0.5, 3.0))
    assert noise.std() == pytest.approx(1.5, rel=0.02) and abs(noise.mean()) < 0.04
    again = mechanism.noisy_sum(jax.random.key(1), blank, jnp.ones(2, bool), 0.5, 3.0)
    np.testing.assert_array_equal(noise, again)  # whoever is there


def test_a_symmetric_matrix_has_the_norm_of_its_vector(x64):
    draw = np.random.default_rng(2)
    one, other = (half + half.T for half in draw.normal(size=(2, 5, 5)))
    vectors = [np.asarray(mechanism.svec(jnp.asarray(matrix))) for matrix in (one, other)]
    assert vectors[0] @ vectors[1] == pytest.approx(np.sum(one * other))
    np.testing.assert_allclose(mechanism.smat(jnp.asarray(vectors[0]), 5), one, atol=1e-14)


def test_white_noise_on_the_vector_reaches_the_edge_that_eigenvalues_are_lifted_to(x64):
    """The largest of a Gaussian orthogonal ensemble: about sigma sqrt(2 s), a little below for finite s."""
    size, sigma = 120, 0.3
    noise = sigma * np.random.default_rng(3).normal(size=size * (size + 1) // 2)
    values, vectors = mechanism.above_noise(mechanism.smat(jnp.asarray(noise), size), sigma)
    edge = sigma * np.sqrt(2 * size)
    assert np.linalg.eigvalsh(np.asarray(mechanism.smat(jnp.asarray(noise), size))).max() == pytest.approx(
        edge, rel=0.1
    )
    assert np.asarray(values).min() >= edge * (1 - 1e-12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-12)


def test_blocks_have_the_joint_multiplier_that_was_split():
    parts = mechanism.split_multiplier(1.7, [0.2, 0.5, 0.3])
    assert mechanism.joint_multiplier(parts) == pytest.approx(1.7)
    assert mechanism.joint_multiplier([3.0]) == pytest.approx(3.0)
    assert mechanism.joint_multiplier([3.0, np.inf]) == pytest.approx(3.0)
    assert mechanism.joint_multiplier([3.0, 0.0]) == 0 and mechanism.joint_multiplier([]) == np.inf


@pytest.mark.parametrize("shares", [(0.8, 0.8), (0.5, 0.4), (1.5, -0.5), (1.0, 0.0), (np.nan, 1.0), ()])
def test_shares_that_are_no_parts_of_one_budget_are_refused(shares):
    with pytest.raises(ValueError, match="shares: needed positive numbers that sum to one, got"):
        mechanism.split_multiplier(1.7, shares)


@pytest.mark.parametrize("noise", [-1.0, np.nan])
def test_a_multiplier_below_zero_is_refused(noise):
    with pytest.raises(ValueError, match="noise: needed 0 or more"):
        mechanism.split_multiplier(noise, [0.5, 0.5])
    with pytest.raises(ValueError, match="multipliers: needed 0 or more"):
        mechanism.joint_multiplier([2.0, noise])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_clipped_like_any_other(dtype):
    """Squares of 20 sum to more than float16 holds, and a clipped entry may be below its least normal number."""
    eps = float(jnp.finfo(dtype).eps)
    vector = jnp.full(1000, 20.0, dtype)
    for bound, least in ((1.0, 1 - 2 * eps), (1e-3, 1 - 1e-2), (50.0, 1 - 2 * eps)):
        clipped = CLIP(vector, bound)
        assert clipped.dtype == dtype
        assert least * bound <= np.linalg.norm(np.asarray(clipped, np.float64)) <= bound
        np.testing.assert_array_equal(CLIP(vector, 1e6), vector)
        assert not np.any(CLIP(vector.at[3].set(jnp.inf), bound))
    rows = jnp.stack([vector, jnp.full(1000, 1e-3, dtype)])
    total = mechanism.noisy_sum(jax.random.key(0), rows, jnp.ones(2, bool), 1.0, 0.0)
    wanted = 1 / np.sqrt(1000) + float(rows[1, 0])
    assert total.dtype == dtype
    np.testing.assert_allclose(np.asarray(total, np.float64), wanted, rtol=eps)
    noise = mechanism.noisy_sum(jax.random.key(1), jnp.zeros([2, 1000]), jnp.ones(2, bool), 0.5, 3.0)
    again = mechanism.noisy_sum(jax.random.key(1), jnp.zeros([2, 1000], dtype), jnp.ones(2, bool), 0.5, 3.0)
    np.testing.assert_array_equal(noise.astype(dtype), again)


def test_a_whitened_frame_is_the_inverse_root_of_the_curvature(x64):
    draw = np.random.default_rng(4)
    half = draw.normal(size=(SIZE, 3))
    values, vectors = np.linalg.eigh(half @ half.T)
    frame = mechanism.whitened(Sketch(jnp.asarray(values[::-1][:3]), jnp.asarray(vectors[:, ::-1][:, :3])), 0.1)
    turned = vectors / np.sqrt(np.maximum(values, 0) / 0.1 + 1) @ vectors.T
    change = draw.normal(size=SIZE)
    np.testing.assert_allclose(mechanism.out_of(frame, jnp.asarray(change)), turned @ change, atol=1e-12)
    plain = mechanism.plain_frame(SIZE, 2, jnp.float64)
    np.testing.assert_array_equal(mechanism.out_of(plain, jnp.asarray(change)), change)


@pytest.mark.parametrize("number", [4, 9], ids="{} rows".format)
def test_public_rows_whiten_by_their_largest_eigenpairs(x64, number):
    draw = np.random.default_rng(6)
    rows, size, rank = draw.normal(size=(number, 6)), 6, 3
    frame = mechanism.frame_of_rows(jnp.asarray(rows), rank, 0.2)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    kept = np.where(np.arange(size) < size - rank, 0, values)
    change = draw.normal(size=size)
    wanted = vectors / np.sqrt(kept / 0.2 + 1) @ vectors.T @ change
    np.testing.assert_allclose(mechanism.out_of(frame, jnp.asarray(change)), wanted, rtol=1e-9)
    for blank in (jnp.zeros([number, size]), jnp.full([number, size], jnp.nan)):
        frame = mechanism.frame_of_rows(blank, rank, 0.2)
        np.testing.assert_array_equal(mechanism.out_of(frame, jnp.asarray(change)), change)
    huge = mechanism.frame_of_rows(jnp.asarray(1e200 * rows), size, 0.2)
    assert np.isfinite(mechanism.out_of(huge, jnp.asarray(change))).all()


def test_a_released_frame_without_noise_whitens_each_output_of_a_dense_layer_alike(x64):
    draw = np.random.default_rng(5)
    phi = draw.normal(size=(7, 4, 3))  # [T, N, D]
    moments = np.einsum("tnd,tne->tde", phi, phi) / 4
    frame = jax.jit(mechanism.released_frame)(jax.random.key(0), jnp.asarray(moments), 1e-12, 0.2)
    mean = np.mean([one / max(np.linalg.norm(one), 1) for one in moments], axis=0)
    values, vectors = np.linalg.eigh(mean / 0.2 + np.eye(3))
    change = draw.normal(size=(3, 5))
    wanted = vectors / np.sqrt(values) @ vectors.T @ change
    np.testing.assert_allclose(mechanism.out_of(frame, jnp.asarray(change.ravel())), wanted.ravel(), rtol=1e-4)
