"""One client's round in pfl: its FederatedAveraging on its SimulatedBackend, one user a central iteration, PyTorch."""

import importlib.metadata

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.round_workers import serve, torch_worker

NEVER = 10**9  # central iterations between evaluations, the first apart


class Network(torch_worker.CNN):
    """The network with what pfl asks of a model."""

    def loss(self, images, labels):
        self.train()
        return torch.nn.functional.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images, labels):
        return {"loss": Weighted(len(labels) * self.loss(images, labels).item(), len(labels))}


def make_network(spec: dict, layout: str) -> Network:
    return torch_worker.with_our_weights(Network(spec), spec, layout)


def make_epochs(spec: dict, layout: str):
    """count -> so many central iterations of one user, one epoch each."""
    network = make_network(spec, layout)
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0))
    user = PyTorchTensorDataset(torch_worker.tensors(spec["examples"], layout), user_id="0")
    federated = FederatedDataset(lambda user_id: user, get_user_sampler("random", ["0"]))
    backend = SimulatedBackend(federated, federated, postprocessors=[WeightByDatapoints()])
    train = NNTrainHyperParams(local_batch_size=spec["batch"], local_num_epochs=1, local_learning_rate=spec["lr"])
    algorithm, done = FederatedAveraging(), 0

    def run(count: int):
        nonlocal model, done
        done += count  # a second run goes on where the first one stopped
        rounds = NNAlgorithmParams(
            central_num_iterations=done, evaluation_frequency=NEVER, train_cohort_size=1, val_cohort_size=0
        )
        model = algorithm.run(rounds, backend, model, train, send_metrics_to_platform=False)

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    spec = serve.spec()
    variants = {f"pfl, {layout}": make_epochs(spec, layout) for layout in torch_worker.LAYOUTS}
    logits = torch_worker.logits(make_network(spec, "default"), spec)
    serve.serve(f"pfl {importlib.metadata.version('pfl')} on torch {torch.__version__}", variants, logits)
