"""The tree arithmetic that `optax.tree` lacks; ravelling happens here and only at the border of a function.

A *stacked* tree carries a leading clients axis on every leaf: [C, ...].
"""

import re
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

HostArray = Any  # a NumPy array where a field's type says jax.Array: as a leaf of a tree it is as good as one


def ratio(a, b):
    """a / b, or 0 where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def root(square: jax.Array) -> jax.Array:
    """The square root, whose derivative at 0 is 0, not NaN."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def length(array: jax.Array, axis: int | None = None) -> jax.Array:
    """|x| of an array, or along an axis, whose derivative at 0 is 0, not NaN."""
    return root(jnp.sum(array * array, axis=axis))


def ravel(tree) -> jax.Array:
    """Concatenates all leaves to one vector [P], in the order of `jax.tree.leaves`."""
    return ravel_pytree(tree)[0]


def ravel_stacked(stacked) -> jax.Array:
    """Concatenates the leaves [C, ...] of a stacked tree to [C, P]."""
    return jax.vmap(ravel)(stacked)


def widened(tree):
    """The tree with floating-point leaves of less than 32 bits in float32; all others as they are."""

    def wide(leaf):
        dtype = jnp.result_type(leaf)
        narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
        return jnp.asarray(leaf, jnp.float32) if narrow else leaf

    return jax.tree.map(wide, tree)


def nbytes(tree) -> int:
    """The bytes of all leaves, or of arrays of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def total(arrays: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays, in their order; there must be one."""
    return cast(jax.Array, sum(arrays))


def weighted_sum(weights: jax.Array, stacked):
    """sum_m weights[m] tree_m, for weights [C] and a stacked tree."""

    def summed(leaf):
        return jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1, precision="highest")

    return jax.tree.map(summed, stacked)


def is_finite(stacked) -> jax.Array:
    """[C] bool: the client's leaves hold neither NaN nor infinity, and their sums do not overflow."""

    def check(leaf):
        # By a sum, which is not finite where an entry is not: XLA on CPU would hold a bool for every entry.
        sums = jnp.sum(leaf.reshape(leaf.shape[0], -1), axis=1, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
        return jnp.isfinite(sums)

    return jnp.all(jnp.stack([check(leaf) for leaf in jax.tree.leaves(stacked)]), axis=0)


def zero_unless(keep: jax.Array, stacked):
    """Sets the clients' trees with keep[m] false to zero; a NaN there does not survive, as it would a product."""

    def kept(leaf):
        return jnp.where(keep.reshape(keep.shape + (1,) * (leaf.ndim - 1)), leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(kept, stacked)


def with_paths(tree) -> list:
    """[(jax's path, leaf)] of all leaves: paths that no two leaves share, whatever their names hold."""
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def in_words(path) -> str:
    """A path of jax's as a person writes it, such as `Dense_0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(tree) -> dict:
    """{path: leaf} with paths such as `Dense_0/kernel`."""
    return {in_words(path): leaf for path, leaf in with_paths(tree)}


def below(leaves: dict, name: str) -> dict:
    """Of {path: leaf} those within the subtree `name`, by their paths in it."""
    parts = {path: path.partition("/") for path in leaves}
    return {rest: leaves[path] for path, (first, _, rest) in parts.items() if first == name}


def select(params, pattern: str, field: str = "trainable") -> dict:
    """The trainable subset: {path: leaf} of the leaves whose path contains the regular expression `pattern`.

    Args:
      field: what the pattern is called, for the error.

    Raises:
      ValueError: no path matches.
    """
    leaves = paths(params)
    chosen = {path: leaf for path, leaf in leaves.items() if re.search(pattern, path)}
    if not chosen:
        raise ValueError(f"{field}: no parameter path matches {pattern!r}; the paths are: {', '.join(leaves)}")
    return chosen


def nested(leaves: dict) -> dict:
    """{path: leaf} as nested dictionaries: {"Dense_0/kernel": leaf} is {"Dense_0": {"kernel": leaf}}."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return tree


def fitted(leaves: dict, like):
    """The tree `like` with the arrays {path: array} in its places.

    Raises:
      ValueError: their paths, types or shapes are not those of `like`; says where.
    """
    got, needed = _forms(leaves), _forms(paths(like))
    differ = sorted(path for path in {*got, *needed} if got.get(path) != needed.get(path))
    if differ:
        raise ValueError(
            "; ".join(f"{path}: {got.get(path, 'absent')}, needed {needed.get(path, 'none')}" for path in differ)
        )
    return replace(like, leaves)


def _forms(leaves: dict) -> dict[str, str]:
    """{path: type and shape} of {path: array}."""
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves.items()}


def replace(params, chosen: dict):
    """The inverse of `select`: `params` with the leaves of `chosen` put in their places."""
    leaves = [chosen.get(path, leaf) for path, leaf in paths(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)
