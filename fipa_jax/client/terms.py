"""What is added to a client's objective? Terms, each with a store that a client keeps from one round to the next.

A term composes with every local first-order optimiser and with every aggregator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from fipa_jax import trees
from fipa_jax.client.examples import masked_mean
from fipa_jax.curvature.sketch import TaskOutputs


class Local(NamedTuple):
    """What a term may look at in one local step."""

    params: Any  # the client's present parameters
    anchor: Any  # the broadcast parameters
    store: Any  # the client's own
    shared: Any  # the mean of all T clients' stores
    mu: jax.Array  # [], the term's weight
    batch: dict  # {field: [B, ...]}
    mask: jax.Array  # [B] bool, which of the batch's examples are the client's own
    out: jax.Array  # [B, K], the outputs at `params`
    features: Any  # at `params`, with fields `levels` (a tuple of [B, ...]) and `last` [B, F], see `networks.Features`
    outputs: TaskOutputs  # (params, batch) -> (out, features)
    examples_of: Callable[[str], jax.Array]  # field -> [N, ...], of all the client's examples
    present: jax.Array  # [N] bool, which of them are its own


class Done(NamedTuple):
    """What a term may look at after the local work."""

    store: Any  # the client's own, before the round
    shared: Any  # the mean of all T clients' stores
    anchor: Any  # the broadcast parameters
    delta: Any  # new minus broadcast parameters
    gradient: Any  # of the term's objective, its mean over the local work; None unless the term needs it, see `Needs`
    mu: jax.Array  # []


class Needs(NamedTuple):
    """What a term asks of the task, of the model and of the local work; a config that cannot give it is refused."""

    fields: tuple[str, ...] = ()  # of the examples
    classes: bool = False  # outputs are logits of at least two classes, and `label` [B] their integers
    features: str = ""  # the field of `networks.Features` that it looks at
    several_steps: bool = False  # where a client takes one step, its slope is zero
    gradient: bool = False  # `Done.gradient`


class Stores(NamedTuple):
    """What the server's side of a term goes by. Its means weigh all clients alike."""

    before: Any  # mean of all T clients' stores before the round
    shared: Any  # and after it
    cohort_before: Any  # mean of the stores of the cohort, as far as the rule lets it take part, before the round
    cohort: Any  # and after it
    mu: jax.Array  # []


def _nothing(params):
    return ()


def _no_penalty(local: Local):
    return 0.0


def _keep_store(done: Done):
    return done.store


def _as_it_is(change, stores: Stores):
    return change


Penalty = Callable[[Local], ArrayLike]  # -> [], added to the mean loss


class Term(NamedTuple):
    """An additive term of the client's objective, of the updates or of the server's step; every client has a store.

    The server keeps `shared`, the mean of all T clients' stores, up to date as the cohort's stores change.
    """

    init: Callable[[Any], Any] = _nothing  # params -> store of a client that has not taken part yet
    penalty: Penalty = _no_penalty
    update: Callable[[Done], Any] = _keep_store  # -> store
    complete: Callable[[Any, Stores], Any] = _as_it_is  # one client's update -> what the rule gets for it
    correct: Callable[[Any, Stores], Any] = _as_it_is  # the rule's step -> what the server takes for it
    whole_batch: bool = False  # whether the penalty is more than a mean over the batch's examples, or free of them
    travels: bool = False  # whether the store is sent to the server, and `shared` to the clients
    remember: Callable[[Any], Any] | None = None  # delta -> store, of a client as the server received its update
    needs: Needs = Needs()
    pulls: bool = False  # whether the penalty holds mu/2 |params - broadcast|^2, which damps a client's update


def changes_the_updates(term: Term) -> bool:
    """Whether the rule gets other updates with the term than the clients have sent."""
    return term.complete is not _as_it_is


def changes_the_step(term: Term) -> bool:
    """Whether the server's step is another one with the term, for the same updates."""
    return changes_the_updates(term) or term.correct is not _as_it_is


def none() -> Term:
    """No term: the plain local objective."""
    return _NONE


def prox() -> Term:
    """FedProx (Li et al. 2020, eq. 2): mu/2 |params - broadcast|^2."""
    return Term(penalty=_proximity, needs=Needs(several_steps=True), pulls=True)


def scaffold() -> Term:
    """SCAFFOLD (Karimireddy et al. 2020, eq. 4): <c - c_i, params>. It has no weight mu.

    store is the control c_i, starting at 0; shared is c = mean_i c_i; c_i <- c_i - c + G_i. G_i is the mean gradient of
    the client's objective, this term included, over its local work, so that c_i is the mean gradient of its loss alone:

    - gradient descent: G_i = -delta / (lr steps), option II;
    - with momentum every gradient counts as much as it has moved the parameters, a clipped one by what is left of it:
      G_i = -delta / (lr sum of these weights). Weight decay is no part of G_i, as all clients have it alike;
    - Adam, Yogi and the natural gradient: G_i is the gradient at the broadcast parameters over all of the client's
      examples, option I, for their moves are in units of their own. Adam and Yogi take one more pass over them;
    - L-BFGS: the mean of the gradients at both ends of the way.
    """

    def penalty(local: Local):
        return optax.tree.vdot(optax.tree.sub(local.shared, local.store), local.params)

    def update(done: Done):
        return jax.tree.map(lambda c_i, c, g: c_i - c + g, done.store, done.shared, done.gradient)

    return Term(optax.tree.zeros_like, penalty, update, travels=True, needs=Needs(gradient=True))


def dyn() -> Term:
    """FedDyn (Acar et al. 2021, algorithm 1): mu/2 |params - broadcast|^2 - <h_i, params>.

    store is the client's gradient h_i at its last local optimum, starting at 0; h_i <- h_i - mu delta. The server's
    state is h = mean_i h_i = shared, and it adds -h / mu to the step. No store travels: the server has all updates.
    """

    def penalty(local: Local):
        return _proximity(local) - optax.tree.vdot(local.store, local.params)

    def update(done: Done):
        return jax.tree.map(lambda h, d: h - done.mu * d, done.store, done.delta)

    def correct(step, stores: Stores):
        return jax.tree.map(lambda s, h: s - h / stores.mu, step, stores.shared)

    return Term(optax.tree.zeros_like, penalty, update, correct=correct, pulls=True)


def moon(temperature: float = 0.5) -> Term:
    """MOON (Li et al. 2021, eq. 3): mu times the contrast of the features with the broadcast and the last local ones.

        -log( e^{sim(z, z_broadcast)/t} / (e^{sim(z, z_broadcast)/t} + e^{sim(z, z_last)/t}) )

    z are the inputs of the last layer, sim is the cosine; store is the client's last local model, the first round's
    broadcast model before it has one. It costs two more forward passes a step.
    """

    def penalty(local: Local):
        mine = _normalise(local.features.last)

        def similarity(params):  # [B]
            return jnp.sum(mine * _normalise(local.outputs(params, local.batch)[1].last), axis=1)

        to_broadcast, to_last = similarity(local.anchor), similarity(local.store)
        return local.mu * masked_mean(_contrast(to_broadcast, to_last[:, None], temperature), local.mask)

    def update(done: Done):
        return optax.tree.add(done.anchor, done.delta)

    return Term(_itself, penalty, update, needs=Needs(features="last"))


def rcl(temperature: float = 0.05, negatives: int = 2, threshold: float = 0.7) -> Term:
    """FedRCL (Seo et al. 2024), relaxed contrastive learning: mu times the mean over feature levels and examples of

        contrast(lowest same-class similarity, the two highest other-class ones)
        + contrast(1, lowest same-class similarity of another example if at least the threshold, else -1)

    with contrast(s, n) = -log( e^{s/t} / (e^{s/t} + sum e^{n/t}) ) and the cosine similarity of the batch's features.
    The second part keeps the features of a class from collapsing into one. The levels are the model's pooled features
    before their ReLU. The published mu is 1.
    """

    def of_level(features, same, other, mask):
        unit = _normalise(features)
        similarity = unit @ unit.T  # [B, B]
        hardest = jax.lax.top_k(jnp.where(other, similarity, -jnp.inf), min(negatives, mask.size))[0]
        lowest = jnp.min(jnp.where(same, similarity, jnp.inf), axis=1)
        apart = same & ~jnp.eye(mask.size, dtype=bool)
        close = jnp.min(jnp.where(apart, similarity, jnp.inf), axis=1)
        close = jnp.where(jnp.any(apart, axis=1) & (close >= threshold), close, -1.0)
        # An example that is not there has no class mates, not even itself.
        pulled = _contrast(jnp.where(mask, lowest, 0), hardest, temperature)
        spread = _contrast(jnp.ones_like(close), close[:, None], temperature)
        return masked_mean(pulled + spread, mask)

    def penalty(local: Local):
        label, mask = local.batch["label"], local.mask
        both = mask[:, None] & mask[None, :]
        equal = label[:, None] == label[None, :]
        levels = local.features.levels
        return local.mu * sum(of_level(level, both & equal, both & ~equal, mask) for level in levels) / len(levels)

    return Term(penalty=penalty, whole_batch=True, needs=Needs(fields=("label",), features="levels"))


def logit_adjustment() -> Term:
    """Logit adjustment (Menon et al. 2021; for clients Zhang et al. 2022): logits shifted by mu log(prior).

    The prior is the client's own label frequencies, smoothed by one example a class: a class that it rarely sees is
    then not unlearned. Added as the difference to the plain cross-entropy.
    """

    def penalty(local: Local):
        classes = local.out.shape[1]
        one_hot = jax.nn.one_hot(local.examples_of("label"), classes, dtype=local.out.dtype)  # [N, K]
        counts = jnp.sum(jnp.where(local.present[:, None], one_hot, 0), axis=0)
        prior = (counts + 1) / (jnp.sum(local.present) + classes)

        def loss(out):  # [B]
            return optax.softmax_cross_entropy_with_integer_labels(out, local.batch["label"])

        return masked_mean(loss(local.out + local.mu * jnp.log(prior)[None]) - loss(local.out), local.mask)

    return Term(penalty=penalty, needs=Needs(fields=("label",), classes=True))


def mifa() -> Term:
    """MIFA (Gu et al. 2021, algorithm 1): an absent client counts with its latest update. It has no weight mu.

    store is y_i, the latest update that the server received of the client. Every update of the cohort gets mean_i y_i -
    mean_cohort y_i more, the first mean over the clients that have taken part so far (published: after a round of all).
    Of FedAvg with uniform weights, `aggregator.weighting`, that leaves mean_i y_i alone. An update stays as it came,
    also where the learning rate decays (published: in units of the present one).
    """

    def init(params):
        return {"update": optax.tree.zeros_like(params), "known": jnp.zeros([], trees.ravel(params).dtype)}

    def remember(delta):
        return {"update": delta, "known": jnp.ones([], trees.ravel(delta).dtype)}

    def complete(update, stores: Stores):
        def move(own, of_all, of_cohort):
            return own + trees.ratio(of_all, stores.shared["known"]) - of_cohort

        return jax.tree.map(move, update, stores.shared["update"], stores.cohort["update"])

    return Term(init, complete=complete, remember=remember)


def varp() -> Term:
    """FedVARP (Jhunjhunwala et al. 2022, algorithm 2): the cohort's part of the absent clients' sum is corrected for.

    store is y_i, the latest update that the server received of the client, starting at 0. Every update of the cohort
    gets mean_i y_i - mean_cohort y_i more, of the y_i before the round. Of FedAvg with uniform weights,
    `aggregator.weighting`, the mean over the draw of the cohort stays what it was. A rule that averages adds this to
    its step; one that multiplies gradients by an inverse curvature does so with this too. An update stays as it came,
    also where the learning rate decays. It has no weight mu.
    """

    def complete(update, stores: Stores):
        def move(own, of_all, of_cohort):
            return own + of_all - of_cohort

        return jax.tree.map(move, update, stores.before, stores.cohort_before)

    return Term(optax.tree.zeros_like, complete=complete, remember=_itself)


def _itself(tree):
    return tree


def feedback() -> Term:
    """Error feedback (Stich et al. 2018): store is what the client's compressed updates have left out so far.

    Nothing is added to the objective; `compression.compressed` writes the store, which stays with the client.
    """
    return Term(optax.tree.zeros_like)


_NONE = Term()
TERMS = {
    "dyn": dyn,
    "feedback": feedback,
    "logit_adjustment": logit_adjustment,
    "mifa": mifa,
    "moon": moon,
    "none": none,
    "prox": prox,
    "rcl": rcl,
    "scaffold": scaffold,
    "varp": varp,
}


def _proximity(local: Local):
    """[]: mu/2 |params - broadcast|^2."""
    return local.mu / 2 * optax.tree.norm(optax.tree.sub(local.params, local.anchor), squared=True)


def _contrast(positive, others, temperature):
    """[B]: -log( e^{p/t} / (e^{p/t} + sum e^{o/t}) ) for positive [B] and others [B, n]; an other of -inf is none."""
    all_ = jnp.concatenate([positive[:, None], others], axis=1) / temperature
    return jax.nn.logsumexp(all_, axis=1) - all_[:, 0]


def _normalise(features):
    """Rows of length one; a row of zeros stays zero, with a finite derivative."""
    square = jnp.sum(features**2, axis=1, keepdims=True)
    return features * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
