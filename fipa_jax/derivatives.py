"""What is a derivative that jax's own rules get wrong, or cannot reach? It is given here, or refused in words.

Eigenvectors have none where two eigenvalues coincide, though smooth functions of the matrix do; and what is float64
within a process of float32 is so in a scope alone, which the reverse sweep of `jax.grad` runs outside of.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def with_derivative_of(smooth: Callable, value: Callable, scope: Callable) -> Callable:
    """The function `value`, with the derivative of another one, `smooth`, that equals it where both are defined.

    In forward and reverse mode, under jit, vmap and shard_map. All is traced within `scope`, the reverse sweep too.

    Args:
      smooth: differentiable by jax's rules within the scope; called only where a derivative is asked for. Its own
        derivative need not be right twice.
      scope: () -> a context.

    Raises:
      TypeError: on a second derivative.
    """

    @jax.custom_jvp
    def call(*args):
        with scope():
            return value(*args)

    def rule(primals, tangents):
        leaves, tree = jax.tree.flatten(primals)
        every = jax.tree.leaves(tangents)
        moving = [i for i, tangent in enumerate(every) if not isinstance(tangent, SymbolicZero)]

        def along(*some):
            given = dict(zip(moving, some, strict=True))
            return smooth(*jax.tree.unflatten(tree, [given.get(i, leaf) for i, leaf in enumerate(leaves)]))

        with scope():
            at, out = refusing(list, ONCE)([leaves[i] for i in moving]), call(*primals)
            push = lambda tangent: jax.jvp(along, at, tangent)[1]
            pull = lambda cotangent: list(jax.vjp(along, *at)[1](cotangent))
            return out, _linear(push, pull, [every[i] for i in moving], out, at)

    call.defjvp(rule, symbolic_zeros=True)
    return call


ONCE = (
    "eigenvalues and functions of merged curvature can be differentiated once, not twice; take finite differences of "
    "the gradient"
)


def _linear(push: Callable, pull: Callable, vector: list, like: Any, at: list) -> Any:
    """push(vector), a linear function at some point `at` with its transpose given.

    As the second half of the solution of [[I, 0], [-push, I]] (x, y) = (vector, 0), which jax can transpose, map and
    differentiate again. (`jax.custom_derivatives.linear_call` cannot be mapped.)
    """
    # An empty sum of all entries, so that each part of the right-hand side depends on the vector, as jax asks.
    nothing = _nothing(vector)
    vector = [part + nothing.astype(part.dtype) for part in vector]
    zero = jax.tree.map(lambda leaf: jnp.broadcast_to(nothing.astype(leaf.dtype), leaf.shape), like)
    add = functools.partial(jax.tree.map, jnp.add)

    def matvec(x):  # of which jax wants all to depend on the point, if its derivative does
        one = 1 + _nothing(at)
        first, second = jax.tree.map(lambda leaf: leaf * one.astype(leaf.dtype), x)
        return first, jax.tree.map(jnp.subtract, second, push(x[0]))

    def solve(_, b):
        return b[0], add(b[1], push(b[0]))

    def solve_transposed(_, b):
        return add(b[0], pull(b[1])), b[1]

    return jax.lax.custom_linear_solve(matvec, (vector, zero), solve, solve_transposed)[1]


def refusing(value: Callable, words: str) -> Callable:
    """The function `value`, whose derivative is refused with a TypeError of these words.

    In reverse mode only where the derivative is needed, so that other results of the same call can be differentiated.
    """

    @jax.custom_jvp
    def call(*args):
        return value(*args)

    def rule(primals, tangents):
        out = call(*primals)
        leaves, tree = jax.tree.flatten(out)
        moving = [tangent for tangent in jax.tree.leaves(tangents) if not isinstance(tangent, SymbolicZero)]
        shapes = tuple(jax.typeof(leaf).to_tangent_aval() for leaf in leaves)
        return out, jax.tree.unflatten(tree, _refused.bind(*moving, shapes=shapes, words=words))

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _refuse(*args, words: str, **_):
    raise TypeError(words)


_refused = Primitive("refused_derivative")
_refused.multiple_results = True
_refused.def_impl(_refuse)
_refused.def_abstract_eval(lambda *args, shapes, words: list(shapes))
ad.primitive_jvps[_refused] = _refuse
ad.primitive_transposes[_refused] = _refuse
mlir.register_lowering(_refused, _refuse)


def _refused_of_many(axis, args, dims, *, shapes, words):
    many = tuple(shape.update(shape=(axis.size, *shape.shape)) for shape in shapes)
    return _refused.bind(*args, shapes=many, words=words), [0] * len(many)


batching.fancy_primitive_batchers[_refused] = _refused_of_many


def vary_with(tree: Any, *others: Any) -> Any:
    """The tree as it is, of the type of what differs between devices wherever one of the other trees does.

    Within `jax.shard_map` the carry of a loop must have that type from the start, which zeros do not; and a gradient in
    what does not differ is summed over the devices, silently. Elsewhere nothing is done.
    """
    axes = frozenset().union(*map(_axes, jax.tree.leaves((tree, others))))

    def varied(leaf):
        lacking = tuple(sorted(axes - _axes(leaf), key=str))
        return jax.lax.pcast(leaf, lacking, to="varying") if lacking else leaf

    return jax.tree.map(varied, tree)


def _axes(leaf: jax.Array) -> frozenset:
    """The axes of the devices' mesh along which a value may differ; how its type says so depends on jax's version."""
    kind = jax.typeof(leaf)
    return frozenset(getattr(getattr(kind, "mat", kind), "varying", None) or getattr(kind, "vma", ()))


def _nothing(arrays: list) -> jax.Array:
    """[], 0, as the sum of no entries of the arrays, which depends on all of them."""
    flat = [jnp.atleast_1d(array) for array in arrays]
    return cast(jax.Array, sum(jnp.sum(jax.lax.slice(array, [0] * array.ndim, [0] * array.ndim)) for array in flat))
