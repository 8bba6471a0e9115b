"""The robust rules beside their definitions in NumPy, and what they are for: a few clients that send anything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import LIKE, SIZE, apply, as_tree, as_vector, assert_close
from scipy.optimize import minimize

from fipa_jax import aggregate

CLIENTS, FAULTY = 7, 0.3  # of seven clients two


def _trimmed(deltas, counts):
    cut = int(FAULTY * len(deltas))
    return np.sort(deltas, axis=0)[cut : len(deltas) - cut].mean(0)


def _krum(deltas, counts, several=False):
    wrong, scores = int(FAULTY * len(deltas)), []
    for i, delta in enumerate(deltas):
        others = sorted(np.sum((delta - other) ** 2) for j, other in enumerate(deltas) if j != i)
        scores.append(sum(others[: max(len(deltas) - wrong - 2, 1)]))
    return deltas[np.argsort(scores)[: len(deltas) - wrong if several else 1]].mean(0)


RULES = {  # name -> (rule, its definition: (deltas [n, P], counts [n]) -> [P])
    "median": (aggregate.median(), lambda deltas, counts: np.median(deltas, axis=0)),
    "trimmed_mean": (aggregate.trimmed_mean(FAULTY), _trimmed),
    "krum": (aggregate.krum(FAULTY), _krum),
    "multi_krum": (aggregate.multi_krum(FAULTY), functools.partial(_krum, several=True)),
}
GEOMETRIC = {name: aggregate.geometric_median(weighting=name) for name in ("examples", "uniform")}
each_rule = pytest.mark.parametrize("name", RULES)


@functools.cache
def _compiled(rule):
    return jax.jit(functools.partial(apply, rule))


def _step(rule, deltas, counts):
    params = jax.tree.map(jnp.asarray, LIKE)
    uploads = aggregate.Uploads(as_tree(deltas), jnp.asarray(counts))
    step, _, info = _compiled(rule)(uploads, rule.init(params), params)
    return as_vector(step), info


def _clients():
    draw = np.random.default_rng(0)
    return draw.normal(size=(CLIENTS, SIZE)), draw.integers(1, 9, CLIENTS)


@pytest.mark.parametrize("absent", [(), (1,), (0, 4), range(1, CLIENTS), range(CLIENTS)], ids=len)
@each_rule
def test_a_step_is_as_defined_over_those_who_take_part(x64, name, absent):
    deltas, counts = _clients()
    counts[list(absent)] = 0
    step, _ = _step(RULES[name][0], deltas, counts)
    present = counts > 0
    assert_close(step, RULES[name][1](deltas[present], counts[present]) if present.any() else np.zeros(SIZE), 1e-12)


@pytest.mark.parametrize("rule", [*(rule for rule, _ in RULES.values()), *GEOMETRIC.values()])
def test_a_few_clients_cannot_steer(x64, rule):
    """However far two of seven go, and whether they agree, the step stays among the others' updates."""
    deltas, counts = _clients()
    counts[:] = 1
    for far in (1e3, -1e12):
        deltas[[2, 5]] = far
        step, _ = _step(rule, deltas, counts)
        others = np.delete(deltas, [2, 5], axis=0)
        assert np.linalg.norm(step - others.mean(0)) <= 2 * np.linalg.norm(others - others.mean(0), axis=1).max()
    mean, _ = _step(aggregate.mean(), deltas, counts)
    assert np.linalg.norm(mean) > 1e10, "which the mean does not survive"


def test_the_geometric_median_has_the_least_sum_of_distances(x64):
    deltas, counts = _clients()

    def total(point):
        return np.sum(counts * np.linalg.norm(deltas - point, axis=1))

    found = minimize(total, np.average(deltas, axis=0, weights=counts), options={"gtol": 1e-10})
    step, _ = _step(GEOMETRIC["examples"], deltas, counts)
    assert total(step) <= found.fun * (1 + 1e-4)
    identical, _ = _step(GEOMETRIC["examples"], np.repeat(deltas[:1], CLIENTS, axis=0), counts)
    assert_close(identical, deltas[0], 1e-12)


ON_A_LINE = (  # where the updates are along one direction, and their numbers of examples
    ([0, 0, 1, 0, 0, 1, 0], [1, 1, 98, 0, 0, 0, 0]),  # most at one place, most examples at another
    ([0, 0, 0, 0, 1, 2, 5], [1, 1, 1, 1, 2, 9, 3]),
    ([0, 1e-3, 1, 0, 0, 0, 0], [1, 1, 98, 0, 0, 0, 0]),
    ([3, 3, 3, 7, 7, -1, 1e6], [1, 1, 1, 2, 2, 1, 2]),
)


@pytest.mark.parametrize(("places", "counts"), ON_A_LINE)
def test_on_a_line_the_geometric_median_is_the_weighted_median(x64, places, counts):
    places, counts = np.array(places, float), np.array(counts)
    best = min(places[counts > 0], key=lambda place: counts @ np.abs(places - place))
    direction = np.random.default_rng(3).normal(size=SIZE)
    step, _ = _step(GEOMETRIC["examples"], places[:, None] * direction, counts)
    np.testing.assert_allclose(step, best * direction, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_updates_that_coincide_do_not_hold_the_geometric_median(x64, weighting, seed):
    """Beside the least of a minimiser's and of all updates' sums of distances."""
    draw = np.random.default_rng(seed)
    deltas, counts = draw.normal(size=(CLIENTS, SIZE)), draw.integers(1, 9, CLIENTS)
    deltas[: 2 + seed] = deltas[0]  # of seven
    shares = counts / counts.sum() if weighting == "examples" else np.full(CLIENTS, 1 / CLIENTS)
    total = lambda point: shares @ np.linalg.norm(deltas - point, axis=1)
    found = minimize(total, deltas.mean(0), options={"gtol": 1e-10}).fun
    step, _ = _step(GEOMETRIC[weighting], deltas, counts)
    assert total(step) <= min(found, *map(total, deltas)) * (1 + 1e-3)


def test_a_client_that_sends_nan_is_left_out_before(x64):
    deltas, counts = _clients()
    deltas[3, 0] = np.nan
    step, info = _step(RULES["median"][0], deltas, counts)
    assert_close(step, np.median(np.delete(deltas, 3, axis=0), axis=0), 1e-12)
    assert info["rejected"][3]


@pytest.mark.parametrize(
    "faulty",
    [0.5, -0.1, float("nan"), np.float32(0.7), np.float64(np.inf), jnp.float32(0.7), jnp.asarray(0.5, jnp.bfloat16)],
    ids=lambda faulty: f"{type(faulty).__name__} {float(faulty):.2g}",
)
def test_a_share_that_no_rule_survives_is_refused(faulty):
    for make in (aggregate.trimmed_mean, aggregate.krum, aggregate.multi_krum):
        with pytest.raises(ValueError, match="faulty"):
            make(faulty)


@pytest.mark.parametrize("kind", [np.float32, jnp.float32, jnp.bfloat16])
def test_a_share_is_a_number_of_any_kind_or_traced(x64, kind):
    """Of seven clients one is left out at either end; a share that is traced passes unlooked at."""
    deltas, counts = _clients()
    wanted = np.sort(deltas, axis=0)[1:-1].mean(0)
    step, _ = _step(aggregate.trimmed_mean(kind(0.2)), deltas, counts)
    assert_close(step, wanted, 1e-12)
    params, uploads = jax.tree.map(jnp.asarray, LIKE), aggregate.Uploads(as_tree(deltas), jnp.asarray(counts))
    traced = jax.jit(lambda share: apply(aggregate.trimmed_mean(share), uploads, (), params)[0])
    assert_close(as_vector(traced(kind(0.2))), wanted, 1e-12)
