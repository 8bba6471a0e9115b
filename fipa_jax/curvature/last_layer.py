"""Are the parameters those of a last dense layer, out = features @ kernel + bias? Then its curvature has a closed form.

Shapes cannot tell: a temperature, a cap or dropout behind the layer leave them as they are. Before a program runs its
text is looked at, `is_last_layer`, which says no where it cannot tell; when it runs, its numbers, `differs`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from fipa_jax import trees
from fipa_jax.curvature.contracts import Features, Outputs
from fipa_jax.derivatives import vary_with

CALLS = {"pjit", "jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"}


def fits(params: Any, out: Any, features: Any) -> bool:
    """Whether the parameters have a dense layer's shapes, [F, K] and at most [K]: features [B, F] to out [B, K].

    Of a sequence model, whose layer is the same at every position, features [B, T, F] to out [B, T, K].
    """
    if not all(hasattr(x, "shape") and len(x.shape) >= 2 for x in (out, features)):
        return False
    if out.shape[:-1] != features.shape[:-1]:
        return False
    bias, shapes = tuple(out.shape[-1:]), [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    kernel = (*features.shape[-1:], *bias)
    return sorted(shapes, key=len) in ([kernel], [bias, kernel])


def affine(params: Any, features: jax.Array) -> jax.Array:
    """[B, ..., K]: features @ kernel + bias, of parameters that fit; linear in them."""

    def part(leaf):
        return features @ leaf if leaf.ndim == 2 else jnp.expand_dims(leaf, range(features.ndim - 1))

    return trees.total(map(part, jax.tree.leaves(params)))


def differs(outputs: Outputs, params: Any, batch: Any, features: jax.Array) -> jax.Array:
    """[] bool: the outputs' derivative in the parameters is not that of the last layer on these features [B, ..., F].

    Both are linear. Where they agree along one random direction they agree along all, but for chance.
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    direction = structure.unflatten(
        [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    )
    pushed = jax.jvp(lambda p: outputs(p, batch), (params,), (vary_with(direction, params),))[1]
    expected = affine(direction, features)
    slack = jnp.sqrt(jnp.finfo(expected.dtype).eps) * jnp.max(jnp.abs(expected), initial=1e-30)
    return jnp.any(jnp.abs(pushed - expected) > slack)


def is_last_layer(outputs: Outputs, features: Features | None, params: Any, batch: Any) -> bool:
    """Whether the outputs' program is features @ kernel + bias, for features that do not depend on the parameters.

    The part of the program that depends on the parameters is run on random numbers. What enters it from the rest of
    the network has to be one array of the features' shape, with which the layer explains the outputs.
    """
    if features is None:
        return False
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), batch)
    out, phi = jax.eval_shape(outputs, params, batch), jax.eval_shape(features, params, batch)
    if phi is None or not fits(params, out, phi) or depends(features, params, batch):
        return False
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    program = jax.make_jaxpr(outputs)(params, batch)
    rng = np.random.default_rng(0)
    leaves, structure = jax.tree.flatten(params)
    with jax.ensure_compile_time_eval():
        drawn = [_draw(rng, leaf) for leaf in leaves]
        found, entering = _run_dependent(program.jaxpr, drawn, rng)
        inputs = [x for x in entering if x.shape == phi.shape and jnp.issubdtype(x.dtype, jnp.floating)]
        if len(found) != 1 or found[0] is None:
            return False
        theta = structure.unflatten(drawn)
        return any(bool(jnp.allclose(affine(theta, x), found[0], rtol=1e-3, atol=1e-3)) for x in inputs)


def depends(function: Callable[..., Any], params: Any, batch: Any) -> bool:
    """Whether function(params, batch) may depend on the parameters; a loop that takes them counts as if it did."""
    program = jax.make_jaxpr(function)(params, batch).jaxpr
    reached = set(program.invars[: len(jax.tree.leaves(params))])
    return any(_reach(program, reached))


def _reach(program: Jaxpr, reached: set) -> list[bool]:
    """Which results of a program depend on the variables `reached`, which grow by all that do."""
    for eqn in program.eqns:
        among = [_variable(v) in reached for v in eqn.invars]
        inner = _called(eqn)
        if inner is not None and any(among):
            within = {v for v, hit in zip(inner.jaxpr.invars, among, strict=True) if hit}
            hits = _reach(inner.jaxpr, within)
        else:
            hits = [any(among)] * len(eqn.outvars)
        reached.update(v for v, hit in zip(eqn.outvars, hits, strict=True) if hit)
    return [_variable(v) in reached for v in program.outvars]


def _run_dependent(program: Jaxpr, params: list, rng) -> tuple[list, list]:
    """(results of a program that depend on its first arguments, None for others; random numbers that entered it)."""
    values, entering = dict(zip(program.invars, params, strict=False)), {}

    def run(program, values):
        def read(v):
            if isinstance(v, Literal):
                return v.val
            if v not in values:
                values[v] = entering[v] = _draw(rng, v.aval)
            return values[v]

        known = set(values)
        for eqn in program.eqns:
            if not any(_variable(v) in known for v in eqn.invars):
                continue
            inner = _called(eqn)
            if inner is None:
                results = eqn.primitive.bind(*map(read, eqn.invars), **eqn.params)
                results = results if eqn.primitive.multiple_results else [results]
            else:
                within = {
                    x: read(v) for x, v in zip(inner.jaxpr.invars, eqn.invars, strict=True) if _variable(v) in known
                }
                results = run(inner.jaxpr, within)
            values.update(zip(eqn.outvars, results, strict=True))
            known.update(eqn.outvars)
        return [values.get(_variable(v)) if _variable(v) in known else None for v in program.outvars]

    return run(program, values), list(entering.values())


def _called(eqn) -> ClosedJaxpr | None:
    """The program that an equation calls once, with its own arguments; None for all else."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    inner = ClosedJaxpr(inner, ()) if isinstance(inner, Jaxpr) else inner
    return inner if isinstance(inner, ClosedJaxpr) and len(inner.jaxpr.invars) == len(eqn.invars) else None


def _variable(v):
    """A variable, None for a literal, which cannot be looked up."""
    return None if isinstance(v, Literal) else v


def _draw(rng, like) -> jax.Array:
    """An array of random numbers, of ones and zeros where it is not floating-point."""
    if jnp.issubdtype(like.dtype, jnp.floating):
        return jnp.asarray(rng.normal(size=like.shape), like.dtype)
    return jnp.asarray(rng.integers(0, 2, like.shape), like.dtype)
