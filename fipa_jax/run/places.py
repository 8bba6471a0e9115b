"""Where does a run's data find room? On the device, or on the host; and what finds room nowhere is refused."""

import os
from typing import Any

import jax
from ml_collections import ConfigDict

from fipa_jax import trees
from fipa_jax.federation.parts import Parts
from fipa_jax.tasks.task import Problem


def store_on_host(config: ConfigDict, parts: Parts, params: Any) -> bool:
    """Whether what clients keep between rounds lives on the host, by `config.client_store`; see `_on_host`."""
    blank = jax.eval_shape(parts.term.init, trees.select(params, parts.trainable))
    return _on_host(config, "client_store", parts.num_clients * trees.nbytes(blank))


def examples_on_host(config: ConfigDict, problem: Problem) -> bool:
    """Whether the clients and their examples live on the host, by `config.examples_on`; see `_on_host`."""
    widest = max(map(len, problem.clients))
    return _on_host(config, "examples_on", trees.nbytes(problem.train) + 4 * len(problem.clients) * widest)


def _on_host(config: ConfigDict, field: str, size: int) -> bool:
    """Whether what takes `size` bytes lives on the host: as the field says, or where it fills a quarter of a device.

    Raises:
      ValueError: it does, but many rounds are to run in one call.
    """
    on_host = config[field] == "host" or (config[field] == "auto" and 4 * size > device_bytes())
    if on_host and config.rounds_per_call > 1:
        raise ValueError(f"config.rounds_per_call: above 1 it needs config.{field} = 'device'")
    return on_host


def check_room(parts: Parts, params: Any) -> None:
    """Refuses a rule whose state, such as past rounds, finds no room on the device.

    Raises:
      ValueError: twice its bytes, before and after a round, are more than the device has.
    """
    size = trees.nbytes(jax.eval_shape(parts.aggregator.init, trees.select(params, parts.trainable)))
    if 2 * size > device_bytes():
        raise ValueError(
            f"config.fipa.aggregator.past: the rule would keep {size / 2**30:.3g} GiB between rounds, and hold them "
            f"twice within one; the device has {device_bytes() / 2**30:.3g} GiB. Lower aggregator.past.rank or "
            "past.length, take aggregator.past.kind = 'prior', or let trainable name fewer parameters"
        )


def device_bytes() -> int:
    """The bytes of a device's memory, where a CPU's is the host's."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or host_bytes()


def host_bytes() -> int:
    """The bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
