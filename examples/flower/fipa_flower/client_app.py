"""The ClientApp: relays to the warm worker beside its node; in a simulation it does the work itself.

What a client keeps (top-k, MOON) lives with the worker; without one it is forgotten when the process ends.
"""

import functools

from fipa_jax.deployment.flower import client_app, client_of, relay


def answer(blob: bytes, context) -> bytes:
    """The upload that answers a broadcast."""
    if "socket" in context.node_config:
        return relay(blob, context)
    settings = tuple(sorted(context.run_config.items()))
    return _site(settings, client_of(context)).work(blob)


@functools.cache
def _site(settings: tuple, client: int):
    """A client's own work in this process, kept for its next message; jax is imported only here."""
    from fipa_jax.deployment.site import Site

    federation = _federation(settings)
    return Site(federation.agreement, client, federation.own(client), federation.width)


@functools.cache
def _federation(settings: tuple):
    """One for all clients of this process, which then share what is compiled."""
    from fipa_flower.problems import named

    return named(dict(settings))


app = client_app(answer)
