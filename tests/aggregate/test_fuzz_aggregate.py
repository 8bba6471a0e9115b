"""Whatever clients send, the step is finite, those at fault are left out, and nobody notices them.

More cases than in the suite: `FUZZ_EXAMPLES=1500 python -m pytest tests/aggregate/test_fuzz_aggregate.py --timeout=0`.
"""

import functools
import itertools
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import apply, with_hyper
from hypothesis import strategies as st

from fipa_jax import aggregate
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature.sketch import Diagonal, Sketch

CLIENTS, SIZE, RANK = 4, 7, 3
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
RULES = {
    "mean": aggregate.mean(),
    "diagonal": aggregate.diagonal(),
    "damped": aggregate.fipa("damped"),
    "damped_absolute": aggregate.fipa(
        "damped", relative=False, limits=aggregate.Limits(trace_cap=0.0), weighting="uniform"
    ),
    "pinv": aggregate.fipa("pinv"),
    "tikhonov": aggregate.fipa("tikhonov", merge="qr"),
    "trusted": aggregate.fipa("damped", relative=False, trust=True),
}
PAIRS = list(itertools.product(RULES, (np.float32, np.float64)))
if "FUZZ_EXAMPLES" not in os.environ:  # some rules in one precision each: compilation is the cost
    PAIRS = [PAIRS[place] for place in (0, 5, 8, 13)]
# What each part of an upload may be, from a sound draw and the dtype's largest number.
UPDATES = {
    "plain": lambda x, most: x,
    "zero": lambda x, most: 0 * x,
    "tiny": lambda x, most: x / most**0.8,
    "large": lambda x, most: x * most**0.45,
    "equal": lambda x, most: np.ones_like(x),
    "overflows": lambda x, most: np.full_like(x, most**0.6),
    "nan": lambda x, most: np.where(np.arange(SIZE) == 2, np.nan, x),
    "infinite": lambda x, most: np.where(np.arange(SIZE) == 0, -np.inf, x),
}
EIGENVALUES = {
    "plain": lambda x, most: x,
    "zero": lambda x, most: 0 * x,
    "low_rank": lambda x, most: x * [1, 0, 0],
    "tiny": lambda x, most: x / most**0.9,
    "large": lambda x, most: x * most**0.4,
    "huge": lambda x, most: x * most**0.95,
    "ill_conditioned": lambda x, most: x * [1, 1e-7, 1e-20],
    "rounded": lambda x, most: x * [1, 1, -(most**-0.4)],
    "negative": lambda x, most: x * [1, 1, -1e3],
    "all_negative": lambda x, most: -x,
    "nan": lambda x, most: x * [1, np.nan, 1],
    "infinite": lambda x, most: x * [np.inf, 1, 1],
    "overflows": lambda x, most: np.full_like(x, 0.9 * most),
}
BASES = {
    "plain": lambda u: u,
    "shared": lambda u: np.eye(SIZE)[:, :RANK],
    "nearly_shared": lambda u: np.linalg.qr(np.eye(SIZE)[:, :RANK] + 1e-6 * u)[0],
    "rounded": lambda u: u * (1 + 2.0**-9 * np.sign(u)),
    "too_long": lambda u: u * [3, 1, 1],
    "twice": lambda u: u[:, [0, 0, 2]],
    "lost": lambda u: 0 * u,
    "nan": lambda u: np.where(u == u.max(), np.nan, u),
    "infinite": lambda u: np.where(u == u.max(), np.inf, u),
}
COUNTS = {
    "plain": 5.0,
    "one": 1.0,
    "many": 1e12,
    "absent": 0.0,
    "negative": -1.0,
    "nan": np.nan,
    "infinite": np.inf,
}
LOSSES = {"plain": 1.0, "low": -1e3, "nan": np.nan, "high": np.inf}
# Of a client: half of each part is plain, or hardly any client would be sound.
_part = lambda table: st.sampled_from(["plain"] * len(table) + list(table))
_client = st.tuples(*(_part(table) for table in (UPDATES, EIGENVALUES, BASES, COUNTS, LOSSES)))
_case = st.fixed_dictionaries(
    {
        "clients": st.lists(_client, min_size=CLIENTS, max_size=CLIENTS),
        "seed": st.integers(0, 2**16),
        "damping": st.sampled_from([1e-3, 0.0, 1e-12, 1.0, 1e12]),
        "rcond": st.sampled_from([1e-5, 0.0, 1e-12]),
        "limits.max_step": st.sampled_from([0.0, 5.0]),
        "limits.explosion": st.sampled_from([0.0, 100.0]),
        "store": st.sampled_from(["", "bfloat16"]),
    }
)


@functools.cache
def _apply(name):
    return jax.jit(functools.partial(apply, RULES[name]))


def _made(case, dtype):
    """{field: array [C, ...]} of what the clients send."""
    draw, most = np.random.default_rng(case["seed"]), float(np.finfo(dtype).max)
    rows = [
        {
            "delta": UPDATES[update](draw.normal(size=SIZE), most),
            "eigenvalues": EIGENVALUES[eigenvalues](np.array([4.0, 2.0, 1.0]) * draw.uniform(0.5, 1), most),
            "basis": BASES[basis](np.linalg.qr(draw.normal(size=(SIZE, RANK)))[0]),
            "counts": COUNTS[count],
            "loss": LOSSES[loss],
        }
        for update, eigenvalues, basis, count, loss in case["clients"]
    ]
    return {name: np.stack([row[name] for row in rows]).astype(dtype) for name in rows[0]}


SOUND = {"delta": np.zeros(SIZE), "eigenvalues": np.ones(RANK), "basis": np.eye(SIZE)[:, :RANK], "counts": 0, "loss": 1}


def _without(sent, faulty):
    """The same, with sound clients that are absent in the place of the faulty ones."""
    put = lambda field, sound: np.where(faulty.reshape(-1, *[1] * (field.ndim - 1)), sound, field).astype(field.dtype)
    return {name: put(field, SOUND[name]) for name, field in sent.items()}


def _uploads(sent, rule, store):
    sent = {name: jnp.asarray(field) for name, field in sent.items()}
    if rule.needs.curvature == "diagonal":
        curvature = Diagonal(jnp.sum(sent["basis"] ** 2 * sent["eigenvalues"][:, None], axis=2))
    else:
        curvature = Sketch(sent["eigenvalues"], sent["basis"].astype(store or sent["basis"].dtype))
    return Uploads(sent["delta"], sent["counts"], curvature, sent["loss"] if rule.needs.loss else None)


def _faulty(uploads):
    """[C] bool, by the arrays themselves, one client after another."""
    found = []
    for m in range(CLIENTS):
        one = jax.tree.map(lambda leaf, m=m: np.asarray(leaf[m], np.float64), uploads)
        eps, most = np.finfo(uploads.delta.dtype).eps, np.finfo(uploads.delta.dtype).max
        with np.errstate(over="ignore", invalid="ignore"):
            bad = not np.sum(one.delta**2) < most or not 0 <= one.num_examples < most
            values = one.sketch.values if isinstance(one.sketch, Diagonal) else one.sketch.eigenvalues
            bad |= not np.abs(np.sum(values)) < most or np.min(values) < -np.sqrt(eps) * np.max(values)
            if isinstance(one.sketch, Sketch):
                kept = one.sketch.basis[:, values > 0]
                bad |= not np.all(np.isfinite(one.sketch.basis))
                bad |= bool(np.any(np.abs(kept.T @ kept - np.eye(kept.shape[1])) > 0.5))
            bad |= one.loss is not None and not np.isfinite(one.loss)
        found.append(bad and one.num_examples != 0)
    return np.array(found)


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(case=_case)
def test_whatever_is_sent_the_step_is_sound(name, dtype, case):
    with jax.enable_x64(dtype == np.float64):
        rule, params = RULES[name], jnp.zeros(SIZE, dtype)
        state = rule.init(params)
        swept = ("damping", "rcond", "limits.max_step", "limits.explosion")
        if state:
            state = with_hyper(state, **{name: case[name] for name in swept if name in rule.hyper})
        sent = _made(case, dtype)
        given = _uploads(sent, rule, case["store"])
        faulty = _faulty(given)
        step, after, info = _apply(name)(given, state, params)
        assert np.all(np.isfinite(step))
        np.testing.assert_array_equal(info["rejected"], faulty)
        assert np.all(np.isfinite(_apply(name)(given, after, params)[0])), "in the round after it"

        wanted, *_ = _apply(name)(_uploads(_without(sent, faulty), rule, case["store"]), state, params)
        np.testing.assert_array_equal(step, wanted)

        out = (faulty | (sent["counts"] == 0))[:, None]
        longest = np.max(np.linalg.norm(np.where(out, 0, sent["delta"].astype(float)), axis=1))
        if case["limits.max_step"] and name not in ("mean", "diagonal"):
            assert np.linalg.norm(step) <= 1.001 * case["limits.max_step"] * longest
        # By rounding, which is amplified by at most the condition of H + beta I.
        if name in ("mean", "diagonal", "damped") and case["damping"] >= 1e-3 and not info.get("fallback"):
            turned = {field: np.roll(array, 1, axis=0) for field, array in sent.items()}
            other, _, same = _apply(name)(_uploads(turned, rule, case["store"]), state, params)
            np.testing.assert_array_equal(same["rejected"], np.roll(faulty, 1))
            if not same.get("fallback"):
                bound = 100 * np.finfo(dtype).eps / min(case["damping"], 1)
                assert np.linalg.norm(np.asarray(other) - step) <= bound * longest
