"""A client's warm worker: has its data, compiles once, and answers the node beside it until it is stopped.

Command: python examples/flower/worker.py --client=2 --socket=/run/user/1000/two.sock --problem=hospitals --data=DIR
"""

import argparse
import tomllib
from pathlib import Path

from fipa_flower.problems import named

from fipa_jax.deployment import worker
from fipa_jax.deployment.site import Site


def main() -> None:
    """Serves one client."""
    folder = Path(__file__).parent
    settings = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", type=int, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    for name, value in settings.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    given = vars(parser.parse_args())
    client, socket = given.pop("client"), given.pop("socket")
    federation = named(given)
    site = Site(federation.agreement, client, federation.own(client), federation.width)
    site.warm_up()
    print(f"client {client} answers at {socket}", flush=True)
    worker.serve(site.work, socket)


if __name__ == "__main__":
    main()
