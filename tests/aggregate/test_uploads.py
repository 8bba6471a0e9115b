"""What clients send: what does not fit is named, and what single clients have sent is stacked where it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import CLIENTS, LIKE, apply_rule, as_tree, clients_of, shapes_of, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import uploads
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature.sketch import FLAGS, Diagonal, Report, Sketch

BAD = 2  # the client that is spoilt


def test_what_does_not_fit_is_named():
    deltas, counts, eigenvalues, basis = (jnp.asarray(field, jnp.float32) for field in clients_of(2))
    delta, params = as_tree(deltas), jax.tree.map(jnp.asarray, LIKE)
    cases = {
        r"num_examples.*\[C\].*\(\)": (delta, counts[0], Sketch(eigenvalues, basis)),
        r"uploads\.delta: needed \(3, 2, 4\) at 'a', got \(4, 2, 4\)": (delta, counts[:3], Sketch(eigenvalues, basis)),
        r"uploads\.delta: 'b' is missing": ({"a": delta["a"]}, counts, Sketch(eigenvalues, basis)),
        r"uploads\.delta: 'c' is no parameter": (delta | {"c": counts}, counts, Sketch(eigenvalues, basis)),
        r"uploads\.delta: needed floating-point arrays, got int32": (delta | {"b": jnp.ones((4, 4), int)}, counts),
        r"uploads\.num_examples: needed 4 real numbers, got bool": (delta, counts > 0),
        r"uploads\.num_examples: needed 4 real numbers, got list": (delta, [1, 1, 1, 1]),
        r"uploads\.sketch: needed Sketch, .* or None, got tuple": (
            delta,
            counts,
            (eigenvalues, basis),
        ),
        r"uploads\.num_examples: needed shape \[C\] with C at least 1": (delta, counts[:0]),
        r"uploads\.sketch.*C = 4, P = 12.*\(4, 11, 2\)": (delta, counts, Sketch(eigenvalues, basis[:, :11])),
        r"uploads\.sketch.*\(3, 2\)": (delta, counts, Sketch(eigenvalues[:3], basis)),
        r"uploads\.sketch.*R at least 1, got \(4, 0\)": (delta, counts, Sketch(eigenvalues[:, :0], basis[..., :0])),
        r"uploads\.sketch.*\(4, 1\)": (delta, counts, Sketch(eigenvalues[:, :1], basis)),
        r"uploads\.sketch: needed values \(4, 12\), got \(4, 11\)": (delta, counts, Diagonal(jnp.zeros([4, 11]))),
        r"uploads\.loss: needed 4 real numbers, got float32 of shape \(3,\)": (delta, counts, None, counts[:3]),
        r"uploads\.ids: needed 4 real numbers, got int32 of shape \(2,\)": (
            delta,
            counts,
            None,
            None,
            None,
            jnp.arange(2),
        ),
        r"uploads\.ids: needed 4 integers, got float32": (delta, counts, None, None, None, jnp.zeros(4)),
        r"uploads\.moved: 'b' is missing": (delta, counts, None, None, None, None, None, {"a": delta["a"]}),
    }
    for words, fields in cases.items():
        with pytest.raises(ValueError, match=words):
            aggregate.receive(Uploads(*fields), params)
    for rule, words in (
        (aggregate.fipa(), r"fipa needs uploads\.sketch, a Sketch"),
        (aggregate.diagonal(), r"diagonal needs uploads\.sketch, a Diagonal"),
    ):
        with pytest.raises(ValueError, match=words):
            shapes_of(rule, Uploads(delta, counts), rule.init(params), params)


@pytest.mark.parametrize("counts", [[2**32, 2**32], [2**32 + 5, 5], [3 * 10**9, 10**9]])
def test_counts_beyond_32_bits_are_not_cut(counts):
    """NumPy's own, such as of tokens; jax without x64 holds none of these as an integer."""
    delta = {"w": np.float32([[1.0], [3.0]])}
    rule, params = aggregate.mean(), {"w": np.zeros(1, np.float32)}
    received, screening = aggregate.receive(Uploads(delta, np.array(counts)), params)
    step = aggregate.step_of(rule, received, rule.init(params), params, screening)[0]
    np.testing.assert_allclose(step["w"], np.average([1.0, 3.0], weights=counts), rtol=1e-6)


def _single(place, **changes):
    """What one client of `clients_of` sends."""
    deltas, counts, eigenvalues, basis = clients_of(2)
    sent = Uploads(as_tree(deltas[place]), counts[place], Sketch(eigenvalues[place], basis[place]))
    return sent._replace(**changes)


def _narrow(place, **parts):
    return _single(place).sketch._replace(**parts)


REPORT = Report(
    np.zeros(2), np.int32(9), np.bool_(True), np.float64(3), np.float64(0), dict.fromkeys(FLAGS, np.bool_(False))
)
MISFITS = {
    "tree": ({"delta": {"a": np.zeros((2, 4))}}, "its update: 'b' is missing"),
    "shape": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(5)}}, r"its update: needed \(4,\) at 'b', got \(5,\)"),
    "words": ({"delta": {"a": np.zeros((2, 4)), "b": "none"}}, "needed arrays, got a str"),
    "integers": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(4, int)}}, "needed floating-point arrays, got int64"),
    "complex": ({"sketch": _narrow(BAD, basis=np.zeros((12, 2), complex))}, "floating-point numbers.*got complex"),
    "rank": ({"sketch": Sketch(np.ones(3), np.zeros((12, 3)))}, "sent a sketch of rank 3, most sent .* rank 2"),
    "size": (
        {"sketch": Sketch(np.ones(2), np.zeros((11, 2)))},
        r"basis.*shape \(12, 2\), got float64 of shape \(11, 2\)",
    ),
    "diagonal": ({"sketch": Diagonal(np.ones(12))}, "sent a diagonal, most sent a sketch of rank 2"),
    "short": ({"sketch": Diagonal(np.ones(11))}, r"its diagonal: .* got float64 of shape \(11,\)"),
    "tuple": ({"sketch": (np.ones(2), np.zeros((12, 2)))}, "its sketch is a tuple"),
    "counts": ({"num_examples": np.ones(2)}, r"num_examples: needed a number, got float64 of shape \(2,\)"),
    "count in words": ({"num_examples": "50"}, "needed arrays, got a str"),
    "count that is a bool": ({"num_examples": True}, "num_examples: needed a number, got bool"),
    "complex count": ({"num_examples": 5 + 1j}, "needed arrays, got a complex"),
    "no count": ({"num_examples": None}, "does not say of how many examples"),
    "loss": ({"loss": 0.5}, "with its loss, most sent a sketch of rank 2"),
    "report": ({"sketch": _narrow(BAD, report=REPORT)}, "with a report, most sent a sketch of rank 2"),
    "report of another version": (
        {"sketch": _narrow(BAD, report=REPORT._replace(flags={"not_finite": np.bool_(False)}))},
        "its report has the flags not_finite, needed asymmetric, ",
    ),
    "report as a dictionary": ({"sketch": _narrow(BAD, report=REPORT._asdict())}, "its report is a dict"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_becomes_a_client_without_examples(x64, misfit):
    changes, words = MISFITS[misfit]
    params = jax.tree.map(jnp.asarray, LIKE)
    sent = [_single(place, **(changes if place == BAD else {})) for place in range(CLIENTS)]
    found, wrong = uploads.collect(sent, params)
    assert list(wrong) == [BAD]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(wrong[BAD])
    deltas, counts, eigenvalues, basis = clients_of(2)
    counts[BAD] = 0
    step, info = apply_rule("damped", found)
    np.testing.assert_array_equal(step, apply_rule("damped", uploads_of(deltas, counts, eigenvalues, basis))[0])
    assert info["absent"].tolist() == [place == BAD for place in range(CLIENTS)]


def test_where_nobody_fits_all_are_absent(x64):
    params = {"a": jnp.zeros(3)}
    found, wrong = uploads.collect([_single(0), None], params)
    assert list(wrong) == [0, 1] and wrong[1] == "it has sent a NoneType, needed Uploads"
    rule = aggregate.mean()
    step, info = apply_to(rule, found, params)
    assert not np.any(step["a"]) and info["absent"].all()
    like = jax.eval_shape(lambda: Uploads(params, jnp.zeros([]), Sketch(jnp.zeros(2), jnp.zeros((3, 2)))))
    found, wrong = uploads.collect([_single(0), None], params, like)
    step, info = apply_to(aggregate.fipa(), found, params)
    assert not np.any(step["a"]) and info["absent"].all()
    with pytest.raises(ValueError, match="there are no clients"):
        uploads.collect([], params)


def apply_to(rule, found, params):
    received, info = aggregate.receive(found, params)
    step, _, info, _ = jax.jit(functools.partial(aggregate.step_of, rule))(received, rule.init(params), params, info)
    return step, info


def test_what_is_asked_for_decides_and_not_the_most(x64):
    params = jax.tree.map(jnp.asarray, LIKE)
    others = [_single(place, sketch=Diagonal(np.ones(12))) for place in range(3)]
    found, wrong = uploads.collect([*others, _single(3)], params, like=_single(0))
    assert {place: why.split(",")[0] for place, why in wrong.items()} == dict.fromkeys(range(3), "sent a diagonal")
    assert isinstance(found.sketch, Sketch) and found.num_examples[3] > 0


class Hostile:
    """An object that raises whatever is done to it."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def _raise(self, *args, **kwargs):
        raise RuntimeError("touched")

    __array__ = __len__ = __iter__ = __eq__ = __repr__ = __str__ = __float__ = __bool__ = __index__ = _raise
    __hash__ = object.__hash__


class HalfUploads(Uploads):
    """A subclass whose fields cannot be read."""

    @property
    def sketch(self):
        raise KeyError("sketch")


def _cycle():
    loop = []
    loop.append(loop)
    return loop


def _deleted():
    array = jnp.ones([4])
    array.delete()
    return array


ODD = [  # makers of things that an upload, or any part of it, may turn out to be
    *(
        lambda value=value: value
        for value in (None, "50", b"\x00", True, 5 + 1j, 10**400, -1, 0, 0.5, np.nan, np.inf, ...)
    ),
    *(lambda kind=kind: kind() for kind in (list, dict, set, object, Hostile, Exception, _cycle, _deleted)),
    lambda: {"a": {1: "x", "y": [None]}, 3: ()},
    lambda: {1: np.ones(3), "one": np.ones(3)},  # keys that cannot be sorted
    lambda: (number for number in range(3)),
    lambda: np.array([object(), None]),
    lambda: np.zeros(4, [("x", float), ("y", int)]),
    lambda: np.array("2026-01-01", "datetime64[D]"),
    lambda: np.ones(4, np.longdouble),
    lambda: np.ma.masked_array(np.ones(4), True),
    lambda: np.ones((2, 4)).view(np.matrix),
    lambda: np.ones((2, 4), ">f4"),
    lambda: np.ones((12, 2), jnp.bfloat16),
    lambda: np.full(4, np.nan, np.float16),
    lambda: jnp.ones(4, jnp.float8_e4m3fn),
    lambda: jnp.ones((12, 2), bool),
    lambda: jax.random.key(0),
    lambda: jax.ShapeDtypeStruct((4,), np.float32),
    lambda: np.zeros((0, 4)),
    lambda: HalfUploads(None, 1),
]
PLACES = (
    (), ("delta",), ("delta", "a"), ("delta", "b"), ("delta", "more"), ("num_examples",), ("loss",), ("damping",),
    ("ids",), ("age",), ("moved",), ("sketch",), ("sketch", "eigenvalues"), ("sketch", "basis"), ("sketch", "report"),
    *(("sketch", "report", name) for name in Report._fields),
    *(("sketch", "report", "flags", name) for name in (*FLAGS, "newer")),
)  # fmt: skip


def _put(tree, path, value):
    """The tree with the value at a path."""
    if not path:
        return value
    name, *rest = path
    if isinstance(tree, dict):
        return tree | {name: _put(tree.get(name), rest, value)}
    if type(tree) in (Uploads, Sketch, Report):
        return tree._replace(**{name: _put(getattr(tree, name), rest, value)})
    return value


def _of_any_kind(rng):
    """An upload of which up to three parts are something odd, or of another precision, order or size."""
    sent = _single(int(rng.integers(CLIENTS)))
    sent = sent._replace(sketch=sent.sketch._replace(report=REPORT))
    for _ in range(rng.integers(1, 4)):
        place, kind = PLACES[rng.integers(len(PLACES))], rng.integers(4)
        value = ODD[rng.integers(len(ODD))]()
        if kind == 3:
            value = rng.normal(size=rng.integers(0, 13, rng.integers(0, 3))).astype(
                rng.choice(["f2", "<f4", ">f8", "i4"])
            )
        sent = _put(sent, place, value)
    return sent


@pytest.mark.parametrize("cases", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_nothing_that_a_client_sends_raises(cases, x64):
    rng, params, fitted = np.random.default_rng(cases), jax.tree.map(jnp.asarray, LIKE), 0
    sound = _single(0)._replace(sketch=_single(0).sketch._replace(report=REPORT))
    receive = jax.jit(aggregate.receive)
    for _ in range(cases // 100):
        sent = [sound, *(_of_any_kind(rng) for _ in range(100))]
        found, wrong = uploads.collect(sent, params, like=sound)
        assert 0 not in wrong and all(isinstance(why, str) and why for why in wrong.values())
        counts = np.asarray(found.num_examples)
        assert not np.any(counts[list(wrong)]) and counts[0] == sound.num_examples
        received, _ = receive(found, params)
        assert received.took_part[0] and not np.any(received.took_part[jnp.array(list(wrong))])
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((received.delta, received.num_examples)))
        fitted += len(sent) - len(wrong)
    assert cases // 20 < fitted < cases // 2  # neither all nor none is odd


def test_all_that_fits_is_stacked(x64):
    params = jax.tree.map(jnp.asarray, LIKE)
    found, wrong = uploads.collect([_single(place) for place in range(CLIENTS)], params)
    assert not wrong
    jax.tree.map(np.testing.assert_array_equal, found, uploads_of(*clients_of(2)))
