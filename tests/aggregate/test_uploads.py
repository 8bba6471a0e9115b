"""What clients send: what does not fit is named, and what single clients have sent is stacked where it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.rules import CLIENTS, LIKE, apply_rule, as_tree, clients_of, shapes_of, uploads_of

from fipa_jax import aggregate
from fipa_jax.aggregate import uploads
from fipa_jax.aggregate.uploads import Uploads
from fipa_jax.curvature.sketch import Diagonal, Sketch

BAD = 2  # the client that is spoilt


def test_what_does_not_fit_is_named():
    deltas, counts, eigenvalues, basis = (jnp.asarray(field, jnp.float32) for field in clients_of(2))
    delta, params = as_tree(deltas), jax.tree.map(jnp.asarray, LIKE)
    cases = {
        r"num_examples.*\[C\].*\(\)": (delta, counts[0], Sketch(eigenvalues, basis)),
        r"uploads\.delta.*leading clients axis": (delta, counts[:3], Sketch(eigenvalues, basis)),
        r"uploads\.delta.*needed": ({"a": delta["a"]}, counts, Sketch(eigenvalues, basis)),
        r"uploads\.sketch.*C = 4, P = 12.*\(4, 11, 2\)": (delta, counts, Sketch(eigenvalues, basis[:, :11])),
        r"uploads\.sketch.*\(3, 2\)": (delta, counts, Sketch(eigenvalues[:3], basis)),
        r"uploads\.sketch.*\(4, 1\)": (delta, counts, Sketch(eigenvalues[:, :1], basis)),
        r"uploads\.sketch: needed values \(4, 12\), got \(4, 11\)": (delta, counts, Diagonal(jnp.zeros([4, 11]))),
        r"uploads\.loss: needed shape \(4,\), got \(3,\)": (delta, counts, None, counts[:3]),
        r"uploads\.ids: needed shape \(4,\), got \(2,\)": (delta, counts, None, None, None, jnp.arange(2)),
        r"uploads\.moved: needed": (delta, counts, None, None, None, None, None, {"a": delta["a"]}),
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


def _single(place, **changes):
    """What one client of `clients_of` sends."""
    deltas, counts, eigenvalues, basis = clients_of(2)
    sent = Uploads(as_tree(deltas[place]), counts[place], Sketch(eigenvalues[place], basis[place]))
    return sent._replace(**changes)


def _narrow(place, **parts):
    return _single(place).sketch._replace(**parts)


MISFITS = {
    "tree": ({"delta": {"a": np.zeros((2, 4))}}, "its update has the tree or shapes"),
    "shape": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(5)}}, "its update has the tree or shapes"),
    "words": ({"delta": {"a": np.zeros((2, 4)), "b": "none"}}, "holds what is no array"),
    "integers": ({"delta": {"a": np.zeros((2, 4)), "b": np.zeros(4, int)}}, "needed floating-point numbers, got.*int"),
    "complex": ({"sketch": _narrow(BAD, basis=np.zeros((12, 2), complex))}, "floating-point numbers, got.*complex"),
    "rank": ({"sketch": Sketch(np.ones(3), np.zeros((12, 3)))}, "sent a sketch of rank 3, most sent .* rank 2"),
    "size": ({"sketch": Sketch(np.ones(2), np.zeros((11, 2)))}, r"basis \(11, 2\), needed \[R\] and \[12, R\]"),
    "diagonal": ({"sketch": Diagonal(np.ones(12))}, "sent a diagonal, most sent a sketch of rank 2"),
    "short": ({"sketch": Diagonal(np.ones(11))}, r"its diagonal has the shape \(11,\)"),
    "tuple": ({"sketch": (np.ones(2), np.zeros((12, 2)))}, "its sketch is a tuple"),
    "counts": ({"num_examples": np.ones(2)}, r"need to be numbers, got shapes \(2,\)"),
    "loss": ({"loss": 0.5}, "with its loss, most sent a sketch of rank 2"),
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


def test_where_nobody_fits_there_is_nothing_to_collect():
    with pytest.raises(ValueError, match=r"none of 2 clients fits the parameters.*tree or shapes"):
        uploads.collect([_single(0), _single(1)], {"a": jnp.zeros(3)})


def test_all_that_fits_is_stacked(x64):
    params = jax.tree.map(jnp.asarray, LIKE)
    found, wrong = uploads.collect([_single(place) for place in range(CLIENTS)], params)
    assert not wrong
    jax.tree.map(np.testing.assert_array_equal, found, uploads_of(*clients_of(2)))
