"""What must a private phase not ask for? Whatever a noisy sum cannot serve, or would say something of single clients.

Before data are loaded, `check`, and once clients and model are known, `check_people`: refusals of one line.
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.config.defaults import privacy
from fipa_jax.config.methods import method
from fipa_jax.data import loading
from fipa_jax.federation.parts import Parts
from fipa_jax.federation.population import OnHost
from fipa_jax.lookup import lookup

WHITENINGS = {
    "none": "clients train the parameters as they are",
    "public": "by the curvature at public examples, anew in each round",
    "release": "by the second moments of all clients' features, released once under noise",
}
SAMPLINGS = {"all": "every client, in every round", "poisson": "each client by chance, by itself"}


def is_private(settings: ConfigDict) -> bool:
    """Whether a phase has a budget."""
    return settings.privacy.epsilon > 0


def check(config: ConfigDict, settings: ConfigDict) -> None:
    """Refuses what a noisy sum cannot serve, and what would say something of single clients, before data are loaded.

    Raises:
      ValueError: names the config field, and what to set it to.
    """
    if not is_private(settings):
        _check_no_wish(config, settings)
        return
    lookup(SAMPLINGS, settings.privacy.sampling, "config.fipa.privacy.sampling")
    lookup(WHITENINGS, settings.privacy.whitening, "config.fipa.privacy.whitening")
    wrong = _by_single_clients(settings) | _shows_clients(config, settings) | _of_sampling(config, settings)
    wrong |= _of_whitening(settings) if settings.privacy.whitening != "none" else {}
    for field, (is_wrong, words) in wrong.items():
        if is_wrong:
            raise ValueError(f"config.{field}: {words} (config.fipa.privacy.epsilon asks for privacy)")


def _check_no_wish(config: ConfigDict, settings: ConfigDict) -> None:
    """Refuses fields of privacy in a phase without a budget, but those that it shares with private methods."""
    plain = privacy()
    some = any(is_private(phase) for phase in (config.fipa, *(method(config, spec) for spec in config.compare)))
    inherited = config.fipa.privacy if some else plain
    for name, value in settings.privacy.items():
        if value not in (plain[name], inherited[name]):
            raise ValueError(
                f"config.fipa.privacy.{name}: got {value!r}, but without a budget nothing is private; set "
                f"privacy.epsilon above 0, or this to {plain[name]!r}"
            )


def _by_single_clients(settings: ConfigDict) -> dict[str, tuple[bool, str]]:
    """{field: (whether it is wrong, why)} of what would look at one client's message, or at what it keeps."""
    faults = {name: rate for name, rate in settings.faults.items() if name != "scale_by"}
    return {
        "fipa.aggregator.name": (
            settings.aggregator.name != "mean",
            f"{settings.aggregator.name!r} looks at single messages, and behind a noisy sum there is one; set it to "
            "'mean' (the method 'fedavg'), and privacy.whitening to 'public' for curvature",
        ),
        "fipa.late.share": (settings.late.share > 0, "a late client would be clipped about another model; set it to 0"),
        "fipa.faults": (any(faults.values()), "nobody may see which upload is faulty; set all of them to 0"),
        "fipa.term.name": (
            settings.term.name not in ("none", "prox"),
            f"{settings.term.name!r} keeps what single clients send, or looks into their examples; set it to 'none'",
        ),
        "fipa.pooled": (settings.pooled, "one client holds all examples, and its data are what is protected"),
        "fipa.least_clients": (settings.least_clients > 1, "a skipped round would tell how many came; set it to 1"),
    }


def _shows_clients(config: ConfigDict, settings: ConfigDict) -> dict[str, tuple[bool, str]]:
    """The same of what would publish figures of the clients' own data."""
    return {
        "eval.clients_every": (config.eval.clients_every > 0, "figures of the clients' own examples leak; set it to 0"),
        "personal.compare": (bool(config.personal.compare), "models of single clients leak; set it to ()"),
        "fipa.privacy.epsilon": (
            config.warmup.rounds > 0,
            "the warm-up trains on the same clients without privacy; set warmup.rounds to 0, and start from a model of "
            "public data with init_from",
        ),
        "task.standardise": (
            config.task.name == "own_data" and config.task.standardise not in _own_scales(config),
            f"{config.task.standardise!r} scales by all clients' inputs or targets; set it to 'public', for the "
            "moments of x_public in the file, or to 'none'",
        ),
        "data.public": (
            config.task.name == "images" and not (config.data.public or loading.has_stats(config.data.name)),
            f"the channels' means of {config.data.name!r} are not known, and would be taken of the clients' images; "
            "name a set of public images",
        ),
        "chunk": (config.chunk < 0, "the seconds of clients' work would steer the run; set it to 1 or more"),
    }


def _own_scales(config: ConfigDict) -> tuple[str, ...]:
    """The ways to scale own data by what is public, or what stays with its client: 'client' scales targets by all."""
    return ("none", "public", "client") if config.task.kind == "classes" else ("none", "public")


def _of_sampling(config: ConfigDict, settings: ConfigDict) -> dict[str, tuple[bool, str]]:
    """The same of who takes part."""
    poisson = settings.privacy.sampling == "poisson"
    return {
        "cohort": (
            poisson != (config.cohort > 0),
            "with privacy.sampling = 'poisson' it is the expected number of clients in a round and needs 1 or more; "
            "with 'all' it needs 0",
        ),
        "examples_on": (poisson and config.examples_on == "host", "sampled rounds have their data on the device"),
    }


def _of_whitening(settings: ConfigDict) -> dict[str, tuple[bool, str]]:
    """The same of clients that train in whitened coordinates."""
    return {
        "fipa.local.weight_decay": (
            settings.local.weight_decay > 0,
            "it would pull the whitened change to 0; set it to 0",
        ),
        "fipa.also_trained": (bool(settings.also_trained), "only what is sent has whitened coordinates; set it to ''"),
        "fipa.privacy.whitening": (
            settings.privacy.whitening == "release" and not settings.cache_body,
            "'release' is of the features before one dense layer; set cache_body = True and trainable to that layer",
        ),
    }


def check_people(experiment: Any, settings: ConfigDict, parts: Parts) -> None:
    """Refuses clients and models that a private phase cannot serve, once they are known."""
    if not is_private(settings):
        return
    given, clients = settings.privacy, parts.num_clients
    if given.delta >= 1 / clients:
        raise ValueError(
            f"privacy.delta: {given.delta} would allow to publish one client as a whole; set it well below 1 / "
            f"{clients}, one over the number of clients"
        )
    if jax.process_count() > 1:
        raise ValueError("privacy.epsilon: the secret of the noise is one process's; run in a single process")
    if given.sampling == "poisson" and isinstance(experiment.population, OnHost):
        raise ValueError("privacy.sampling: 'poisson' needs config.examples_on = 'device'")
    if given.whitening != "none":
        _check_whole(experiment, settings)


def _check_whole(experiment: Any, settings: ConfigDict) -> None:
    """Refuses a phase whose trained parameters do not give the outputs by themselves."""
    chosen = trees.select(experiment.params, settings.trainable)
    if not settings.cache_body and len(chosen) < len(jax.tree.leaves(experiment.params)):
        raise ValueError(
            "privacy.whitening: needs trainable to name all parameters, or cache_body = True and the head alone"
        )
    if settings.privacy.whitening == "release" and len({path.rpartition("/")[0] for path in chosen}) > 1:
        raise ValueError(f"privacy.whitening: 'release' is for one dense layer, and trainable names {list(chosen)}")
