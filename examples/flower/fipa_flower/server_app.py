"""The ServerApp: opens the federation's work directory, and runs the rounds that are left."""

import functools

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fipa_flower import problems
from fipa_jax.deployment.flower import Fipa
from fipa_jax.deployment.server import opened

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run of Flower."""
    settings = context.run_config
    federation = problems.named(settings)
    figures = functools.partial(_figures, federation, federation.test())
    who = by_name if settings["authenticate"] else None
    given = federation.agreement, federation.config, settings["workdir"], figures, settings["resume"]
    with opened(*given) as server:
        Fipa(server, timeout=settings["timeout"], who=who).start(grid)


def by_name(node) -> int | None:
    """The client that a node is: whoever runs the SuperLink has registered its key as that of `client-N`."""
    name, _, number = node.name.partition("-")
    return int(number) if name == "client" and number.isdigit() else None


def _figures(federation: problems.Federation, test: dict, params) -> dict:
    return federation.figures(params, test)
