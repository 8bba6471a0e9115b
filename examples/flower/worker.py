r"""A client's warm worker: has its data, compiles once, and answers the node beside it until it is stopped.

Command: python examples/flower/worker.py --client=2 --socket=/run/user/1000/two.sock \
           --settings='{"problem": "hospitals", "data": "DIR"}'
"""

import argparse
import json
import tomllib
from pathlib import Path

from absl import logging
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
    parser.add_argument("--settings", type=json.loads, default={}, help="of the run, where they differ from the file")
    parser.add_argument("--memory", default="", help="a file for what the client keeps (top-k, MOON)")
    given = parser.parse_args()
    federation = named(settings | given.settings)
    site = Site(federation.agreement, given.client, federation.own(given.client), federation.width, given.memory)
    site.warm_up()
    logging.set_verbosity(logging.INFO)
    print(f"client {given.client} answers at {given.socket}", flush=True)
    worker.serve(site.work, given.socket)


if __name__ == "__main__":
    main()
