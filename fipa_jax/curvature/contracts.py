"""What must a model, a loss and their data be like, for the curvature to be right? Checked where a program is traced.

    params   a pytree of floating-point arrays
    batch    a pytree of arrays [N, ...], the examples along the first axis of each
    mask     [N] bool, the examples that are there
    outputs  (params, batch) -> a pytree of floating-point arrays [N, ...], each example's of that example alone
    loss     (out, batch) -> [N], one number of each example, of its own outputs

Types and shapes are looked at by every function that takes them; a call of a compiled program pays nothing for it.
What only numbers can tell is looked at by `check`, and by every sketch for its report.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fipa_jax import trees

Outputs = Callable[[Any, Any], Any]  # (params, batch) -> out, a pytree of [B, ...], of each example by itself
Loss = Callable[[Any, Any], jax.Array]  # (out, batch) -> [B], of each example
Features = Callable[[Any, Any], jax.Array]  # (params, batch) -> [B, ..., F], the inputs of the last layer
Number = jax.Array | float  # [], which may be traced
Given = TypeVar("Given")


class MakeVector(Protocol):
    """A function of parameters and of a batch's examples, those of a mask [N] or all: a vector [P], like a gradient."""

    def __call__(self, params: Any, batch: Any, mask: jax.Array | None = None) -> jax.Array: ...


def check(outputs: Outputs, loss: Loss, params: Any, batch: Any, mask: jax.Array | None = None) -> None:
    """Checks a model and a loss on some examples: types, shapes, finite numbers, and that examples are kept apart.

    For a first call, outside of jit. A report's flag `examples_mixed` says the same of the last point.

    Args:
      outputs, loss: see `products.make_ggn`.
      params: parameter pytree.
      batch: leaves [N, ...].
      mask: [N] bool, the examples that are there; all without one.

    Raises:
      ValueError: what is wrong, in words.

    Example:
      check(outputs, loss, params, {"x": x, "y": y})  # e.g. "loss: needed one number per example, shape (12,), got ..."
    """
    floating(params, "params")
    batch, mask = present_rows(batch, mask)
    out = of_each_example(outputs)(params, batch)
    losses = one_number_each(loss)(out, batch)
    for name, values in {"outputs": out, "loss": losses}.items():
        wrong = [path for path, leaf in trees.paths(values).items() if not bool(jnp.all(jnp.isfinite(leaf)))]
        if wrong:
            raise ValueError(f"{name}: not finite at these parameters{_at(wrong[0])}")
    if bool(mixes_examples(outputs, loss, params, batch, mask)):
        raise ValueError(
            "outputs: an example's outputs, or its loss, change with the other examples of its batch, as with batch "
            "normalisation in training mode; run the model in evaluation mode"
        )


def mixes_examples(
    outputs: Outputs, loss: Loss, params: Any, batch: Any, mask: jax.Array | None = None
) -> jax.Array | bool:
    """[] bool: the first example's outputs or loss change where the last one stands beside it.

    What is compared is computed alike, in batches of two, or from the same outputs: of a model that fits its data what
    is left of outputs and losses may be little more than rounding, which differs between programs.
    """
    number = num_examples(batch)
    if number < 2:
        return False
    first, last = (0, number - 1) if mask is None else (jnp.argmax(mask), number - 1 - jnp.argmax(mask[::-1]))

    def beside(other):
        return jax.tree.map(lambda x: x[jnp.array([first, other])], batch)

    def of_first(tree):
        return jax.tree.map(lambda x: x[:1], tree)

    pair = beside(last)
    with_itself, with_last = (of_each_example(outputs)(params, few) for few in (beside(first), pair))
    together = one_number_each(loss)(with_last, pair)
    alone = one_number_each(loss)(of_first(with_last), of_first(pair))
    leaves = list(zip(jax.tree.leaves(of_first(with_itself)), jax.tree.leaves(of_first(with_last)), strict=True))
    rounding = 10 * jnp.finfo(alone.dtype).eps * _largest([one for one, _ in leaves])  # as in log sum exp - logit
    mixed = [_differ(*pair) for pair in leaves]
    return jnp.any(jnp.stack([*mixed, _differ(alone, together[:1], rounding)]))


def _largest(arrays: list[jax.Array]) -> jax.Array:
    """[], the largest magnitude in them."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(array), initial=1e-30) for array in arrays]))


def _differ(one: jax.Array, other: jax.Array, rounding: jax.Array | float = 0.0) -> jax.Array:
    """[] bool: two arrays differ by more than rounding; false for NaN, which has a flag of its own."""
    slack = 10 * jnp.sqrt(jnp.finfo(one.dtype).eps) * _largest([one])
    return jnp.any(jnp.abs(one - other) > slack + rounding)


def floating(tree: Any, name: str) -> Any:
    """The tree, all of whose leaves are floating-point arrays.

    Integers and booleans cannot be trained or averaged: they are refused everywhere, never rounded.

    Args:
      name: of what the tree is, for the error.

    Raises:
      ValueError: a leaf is none, by its path; or there are no leaves.
    """
    leaves = trees.with_paths(tree)
    for path, leaf in leaves:
        if not _is_floating(leaf):
            raise ValueError(
                f"{name}: needed floating-point arrays, got {kind(leaf)}{_at(trees.in_words(path))}; keep counters, "
                "flags and keys out of what is trained"
            )
    if not leaves:
        raise ValueError(f"{name}: there are no arrays in it")
    return tree


def num_examples(batch: Any) -> int:
    """N, the length of the first axis of every leaf.

    Raises:
      ValueError: a leaf has no such axis, or another length.
    """
    leaves = trees.paths(batch)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not leaf.shape or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(f"batch: needed arrays with a first axis of examples, got {kind(leaf)}{_at(path)}")
    lengths = {path: leaf.shape[0] for path, leaf in leaves.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"batch: needed as many examples in every array, got {lengths or 'no arrays'}")
    return next(iter(lengths.values()))


def present_rows(batch: Any, mask: jax.Array | None) -> tuple[Any, jax.Array | None]:
    """(batch, mask) in which rows that are masked out repeat one that is there, so that no network sees them.

    A batch without examples becomes one masked example of zeros.

    Raises:
      ValueError: the batch's arrays do not fit each other, or the mask does not fit them.
    """
    number = num_examples(batch)
    if number == 0:
        batch = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
        return batch, jnp.zeros([1], bool)
    if mask is None:
        return batch, None
    mask = jnp.asarray(mask)
    if mask.shape != (number,) or not jnp.issubdtype(mask.dtype, jnp.bool_):
        raise ValueError(f"mask: needed {number} booleans, one of each example, got {kind(mask)}")
    rows = jnp.where(mask, jnp.arange(number, dtype=jnp.int32), jnp.argmax(mask).astype(jnp.int32))
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], batch), mask


def of_each_example(outputs: Outputs) -> Outputs:
    """The outputs, looked at wherever they are traced, in float32 at least.

    Parameters and inputs of half precision are widened too, as curvature is never seen in less than float32.
    """

    def checked(params, batch):
        out = outputs(trees.widened(floating(params, "params")), trees.widened(batch))
        return rows_of_each_example(out, batch)

    return checked


def rows_of_each_example(out: Any, batch: Any) -> Any:
    """The outputs of a batch, looked at, in float32 at least.

    Raises:
      ValueError: they are not floating-point arrays with one row of each example.
    """
    number = num_examples(batch)
    for path, leaf in trees.paths(floating(out, "outputs")).items():
        if jnp.shape(leaf)[:1] != (number,):
            raise ValueError(f"outputs: needed a first axis of {number} examples, got shape {leaf.shape}{_at(path)}")
    return trees.widened(out)


def one_number_each(loss: Loss) -> Loss:
    """The loss, looked at wherever it is traced, in float32 at least."""

    def checked(out, batch):
        losses, number = loss(out, batch), num_examples(batch)
        if jnp.shape(losses) != (number,):
            raise ValueError(
                f"loss: needed one number per example, shape ({number},), got {jnp.shape(losses)}; sum or average over "
                "the other axes, and leave the mean over examples out"
            )
        return trees.widened(floating(losses, "loss"))

    return checked


def key(key: jax.Array) -> jax.Array:
    """The key, which is one.

    Raises:
      ValueError: it is no single key.
    """
    array = hasattr(key, "shape") and hasattr(key, "dtype")
    new = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    old = array and key.dtype == jnp.uint32 and len(key.shape) == 1
    if not (new or old):
        raise ValueError(f"key: needed one key, such as jax.random.key(0), got {kind(key)}")
    return key


def given(value: Given | None, name: str) -> Given:
    """The value, which must be there.

    Args:
      name: of it, for the error, with what needs it.

    Raises:
      ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"{name}: needed, and missing")
    return value


def is_known(number: Number) -> bool:
    """Whether a number can be looked at now, as it is not traced."""
    return not isinstance(number, Tracer)


def at_least(least: float, **numbers: Any) -> None:
    """Refuses numbers below a bound, NaN, and what is no number; those that are traced pass.

    Raises:
      ValueError: names the number.
    """
    for name, value in numbers.items():
        if is_known(value):
            array = np.asarray(value)
            if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):  # of half precision
                raise ValueError(f"{name}: needed a number, got {value!r:.40}")
            if not np.all(array >= least):
                raise ValueError(f"{name}: needed {least:g} or more, got {value}")


def _is_floating(leaf: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    except (TypeError, ValueError):  # what is no number at all
        return False


def kind(value: Any) -> str:
    """What something is, in a few words."""
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return f"{type(value).__name__} {value!r:.40}"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def check_loss_rank(loss_rank: int, jacobian: str) -> None:
    """Refuses, with a ValueError, a `loss_rank` where the curvature is not seen by its rows: it would be all there."""
    if loss_rank > 0 and jacobian != "rows":
        raise ValueError(
            f"sketch.loss_rank: is of explicit rows, not of {jacobian!r}; set it to 0, or sketch.solver or "
            "sketch.jacobian to 'rows'"
        )


def shapes(tree: Any) -> list[list[int]]:
    """The shape of each leaf."""
    return [list(leaf.shape) for leaf in jax.tree.leaves(tree)]


def _at(path: str) -> str:
    """Where in a tree, in words; nothing at its root."""
    return f" at {path!r:.200}" if path else ""
