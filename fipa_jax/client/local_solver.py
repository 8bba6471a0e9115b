"""What do local solvers share? What they are given, what they return, a client's objective; wrappers of any of them.

The solvers themselves are in `first_order` and `second_order`, and a new one is entered in `LOCAL_SOLVERS` there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fipa_jax import backend, trees
from fipa_jax.client.examples import Client, gather, masked_mean, own_indices, present
from fipa_jax.client.terms import Done, Local, Term, none
from fipa_jax.curvature import contracts
from fipa_jax.curvature.contracts import Loss
from fipa_jax.curvature.layer_factors import LayerFactors
from fipa_jax.curvature.sketch import Sketch, TaskOutputs, smallest
from fipa_jax.derivatives import vary_with

FEW = 5  # examples whose activations in a small network stay in a core's cache


class Hyper(NamedTuple):
    """Hyper-parameters of local work that are traced."""

    lr: jax.Array  # []
    damping: jax.Array  # [], of the Gauss-Newton step or the natural gradient
    mu: jax.Array  # [], weight of the term
    steps: jax.Array | int = 0  # [] int32, local steps, where positive, instead of the solver's own number
    sketch: Sketch | LayerFactors | None = None  # the client's own, where the solver asks for it
    posterior: Any = None  # the server's belief, `client.ivon.Posterior`, where the solver asks for it
    part: jax.Array | None = None  # [] in [0, 1], the share of the steps after which a first-order solver stops
    frame: Any = None  # a `privacy.mechanism.Frame`, the coordinates in which a private client trains


class LocalResult(NamedTuple):
    """What a client has after its local work."""

    delta: Any  # new minus broadcast parameters
    store: Any  # what the client keeps for the term until its next round
    loss: jax.Array  # [], mean training loss over its steps
    before: jax.Array | None = None  # [], mean loss over its examples at the broadcast parameters
    message: Any = None  # what its work says of its curvature, where no sketcher does: a `Diagonal` of precisions
    damping: jax.Array | None = None  # [], beta_m of (H_m + beta_m I) delta = -gradient, nearly


# (outputs, params, data, client, key, hyper, store, shared) -> LocalResult: one client, pure, jittable. `data` are the
# whole set's fields {field: [N_total, ...]}, `store` is the client's own and `shared` the mean of all clients' stores.
LocalSolver = Callable[[TaskOutputs, Any, dict, Client, jax.Array, Hyper, Any, Any], LocalResult]
Objective = Callable[[Any, dict, jax.Array], tuple[jax.Array, jax.Array]]
MeanGradient = Callable[[Any, dict, jax.Array], tuple[Any, jax.Array]]


class Work(NamedTuple):
    """What one client works with in a round."""

    outputs: TaskOutputs
    params: Any  # the broadcast parameters
    data: dict  # {field: [N_total, ...]}
    client: Client
    hyper: Hyper
    store: Any  # the client's own
    shared: Any  # the mean of all T clients' stores

    @property
    def examples(self) -> dict:
        """{field: [N, ...]}, the client's examples; its first one again where there are none."""
        return gather(self.data, own_indices(self.client))


class Improvement(NamedTuple):
    """What a client has found in a round."""

    delta: Any  # new minus broadcast parameters
    loss: jax.Array  # [], mean training loss over its steps
    gradient: Any = None  # of its objective, the mean over the local work, where the term needs it: see `terms.Done`
    damping: jax.Array | None = None  # [], see `LocalResult`
    message: Any = None  # see `LocalResult`


class ByCurvature(NamedTuple):
    """What a local solver steps by: it is given the client's own, `Hyper.sketch`, before it begins."""

    needs: tuple[str, ...]  # of `aggregate.Needs.curvature`, one of which the rule must ask for
    rule: str  # that does
    words: str  # what it is called


Improve = Callable[[Work, jax.Array], Improvement]  # (work, key) -> what a client has found


def solver_of(improve: Improve, term: Term) -> LocalSolver:
    """The local solver that improves by `improve(work, key)`, and then keeps what the term asks to keep."""

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        contracts.floating(params, "params")
        given = (params, data, client, hyper, store, shared, key)
        params, data, client, hyper, store, shared, key = vary_with(given)
        found = improve(Work(outputs, params, data, client, hyper, store, shared), key)
        if term.needs.gradient and found.gradient is None:
            raise ValueError("term: needs the mean gradient of the local work, and this solver's Improvement has none")
        store = term.update(Done(store, shared, params, found.delta, found.gradient, hyper.mu))
        return LocalResult(found.delta, store, found.loss, damping=found.damping, message=found.message)

    return solve


def takes_no(optimizer: str, **fields: float) -> None:
    """Refuses fields of `local` that a solver does not know.

    Raises:
      ValueError: one of them is not 0.
    """
    for name, value in fields.items():
        if value:
            raise ValueError(f"local.optimizer = {optimizer!r} takes no local.{name}: set it to 0")


def adaptive_steps(local: LocalSolver, scale: float, most: int, reach: float = 1.0) -> LocalSolver:
    """The local solver with as many steps as `steps_for` says of the client's own sketch, `hyper.sketch`.

    Args:
      scale, most: see `steps_for`, whose rule is that of gradient descent. (With Adam and Yogi it is published too, and
        a guess.)
      reach: of the solver's steps in units of the learning rate: 1 / (1 - b) with momentum b.
    """

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        steps = steps_for(
            smallest(contracts.given(hyper.sketch, "hyper.sketch of adaptive steps").eigenvalues),
            reach * hyper.lr,
            scale,
            most,
        )
        return local(outputs, params, data, client, key, hyper._replace(steps=steps), store, shared)

    return solve


def with_initial_loss(
    local: LocalSolver, loss: Loss, weight_decay: float = 0.0, term: Term | None = None
) -> LocalSolver:
    """The local solver whose result says the client's objective at the parameters that it has received, `before`.

    That is the mean loss, the term's penalty, and l2/2 |params|^2, l2 the weight decay.
    """
    term = term or none()

    def solve(outputs, params, data, client, key, hyper, store, shared) -> LocalResult:
        result = local(outputs, params, data, client, key, hyper, store, shared)
        objective = make_objective(Work(outputs, params, data, client, hyper, store, shared), loss, term)
        before, _ = objective(params, gather(data, own_indices(client)), present(client))
        if weight_decay:
            before = before + weight_decay / 2 * optax.tree.norm(trees.widened(params), squared=True)
        return result._replace(before=before.astype(result.loss.dtype))

    return solve


def make_objective(work: Work, loss: Loss, term: Term) -> Objective:
    """Builds `objective(theta, examples, mask) -> (mean loss + the term's penalty, mean loss)` of a client.

    The means are over the mask's examples, {field: [B, ...]} and [B].
    """
    outputs, params, data, client, hyper, store, shared = work
    owned, loss = present(client), contracts.one_number_each(loss)

    def all_examples(field):
        return data[field][client.indices]

    def objective(theta, examples, mask):
        out, features = outputs(theta, examples)
        out = contracts.rows_of_each_example(out, examples)
        mean_loss = masked_mean(loss(out, examples), mask)
        at = Local(theta, params, store, shared, hyper.mu, examples, mask, out, features, outputs, all_examples, owned)
        return mean_loss + term.penalty(at), mean_loss

    return objective


def regularised(clip_norm: float, weight_decay: float) -> optax.GradientTransformation:
    """Clips a gradient's norm, and adds weight_decay * params; 0 for neither."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
    )


def mean_gradient(work: Work, loss: Loss, term: Term, batch: int, micro_batch: int) -> MeanGradient:
    """Builds `gradient(theta, examples, mask) -> (gradient of the client's objective, mean loss)`.

    Args:
      batch: B, the examples of a call.
      micro_batch: of them at a time, see `micro_batch_of`; a term that needs the whole batch takes all.
    """
    at_a_time = batch if term.whole_batch else micro_batch_of(micro_batch, batch)
    return in_micro_batches(jax.grad(make_objective(work, loss, term), has_aux=True), batch // at_a_time)


def in_micro_batches(gradient: MeanGradient, number: int) -> MeanGradient:
    """`gradient(theta, examples, mask) -> (gradient, mean loss)`, as a sum over so many micro-batches."""
    if number == 1:
        return gradient

    def summed(theta, examples, mask):
        parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), (examples, mask))
        shares = jnp.sum(parts[1], axis=1) / jnp.maximum(jnp.sum(mask), 1)

        def add(total, part_and_share):
            part, share = part_and_share
            value = gradient(theta, *part)
            return jax.tree.map(lambda t, g: (t + share * g).astype(t.dtype), total, value), None

        blank = jax.tree.map(jnp.zeros_like, theta), jnp.zeros([], trees.ravel(trees.widened(theta)).dtype)
        return jax.lax.scan(add, vary_with(blank, theta, parts), (parts, shares))[0]

    return summed


def micro_batch_of(wanted: int, batch: int) -> int:
    """The largest divisor of the batch that is at most as wanted; as suits the backend, the nearest to a few."""
    divisors = [m for m in range(1, batch + 1) if batch % m == 0]
    if wanted < 0 and backend.kind() == "cpu":
        return min((m for m in divisors if 2 * m > FEW), key=lambda m: abs(m - FEW), default=batch)
    return max(m for m in divisors if m <= (wanted if wanted > 0 else batch))


def steps_for(least: jax.Array, lr: jax.Array, scale: float, most: int) -> jax.Array:
    """tau = ceil(c / -ln(1 - lr lam_min)), between 1 and `most`: the published rule for the number of local steps.

    After tau steps of gradient descent the error in the weakest direction kept has shrunk by a factor of e^{-c}.

    Args:
      least: [], lam_min, see `sketch.smallest`.
      lr: [].
      scale: c.
      most: the bound.
    """
    rate = -jnp.log1p(-jnp.clip(lr * least, 0, 1))  # infinite where one step does it
    steps = scale / jnp.maximum(rate, jnp.finfo(least.dtype).tiny)
    return jnp.clip(jnp.ceil(steps), 1, most).astype(jnp.int32)
