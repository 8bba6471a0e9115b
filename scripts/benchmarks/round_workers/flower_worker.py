"""One client's round in Flower: its FedAvg in its simulation on Ray, one node, PyTorch as in its own quickstart.

The simulation starts once and the server's program answers the questions, so that no time has Ray's start in it. A time
is the user CPU seconds of all processes, the client's and Ray's own included, from the server's start of five rounds to
its end of them. Waiting for a round is sleeping; what Ray's other processes do meanwhile is counted.
"""

import importlib.metadata
import logging
import os

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # before flwr and ray read them

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.round_workers import serve, torch_worker

ONE_CORE = {"init_args": {"num_cpus": 1}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


def make_client(spec: dict) -> ClientApp:
    """A client that trains for one epoch, in the layout that a message names."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        torch.set_num_threads(1)  # this is a process of Ray's
        layout = message.content["config"]["layout"]
        network = torch_worker.CNN(spec).to(memory_format=torch_worker.LAYOUTS[layout])
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        torch_worker.train(network, spec, layout)
        metrics = MetricRecord({"num-examples": spec["examples"]})
        reply = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
        return Message(content=reply, reply_to=message)

    return app


def make_server(spec: dict) -> ServerApp:
    """A server that runs rounds as it is asked, until its input ends."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        network = torch_worker.make_network(spec, "default")
        arrays = ArrayRecord(network.state_dict())

        def rounds(layout):
            def run(count: int):
                nonlocal arrays
                config = ConfigRecord({"layout": layout})
                arrays = strategy.start(grid, arrays, num_rounds=count, train_config=config).arrays

            return run

        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch"))
        versions = f"flower {importlib.metadata.version('flwr')} on {versions}"
        variants = {f"flower, {layout}": rounds(layout) for layout in torch_worker.LAYOUTS}
        serve.serve(versions, variants, torch_worker.logits(network, spec), clock=serve.family_seconds)

    return app


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    spec = serve.spec()
    run_simulation(make_server(spec), make_client(spec), num_supernodes=1, backend_config=ONE_CORE)
