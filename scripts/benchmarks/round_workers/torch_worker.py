"""One client's epoch in plain PyTorch, in both memory layouts."""

import torch
from torch import nn

from benchmarks import setting
from benchmarks.round_workers import serve

LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}


class Network(nn.Module):
    """The CNN of `fipa_jax.models`: 3x3 convolutions with pooling and ReLU, one hidden layer, no biases."""

    def __init__(self, spec: dict):
        super().__init__()
        first, second = spec["channels"]
        self.conv1 = nn.Conv2d(3, first, 3, bias=False)
        self.conv2 = nn.Conv2d(first, second, 3, bias=False)
        self.dense1 = nn.Linear(second * 6 * 6, spec["hidden"], bias=False)
        self.dense2 = nn.Linear(spec["hidden"], spec["classes"], bias=False)

    def forward(self, images):  # uint8
        x = (images.float() / 255 - 0.5) / 0.25
        x = torch.relu(torch.max_pool2d(self.conv1(x), 2))
        x = torch.relu(torch.max_pool2d(self.conv2(x), 2))
        return self.dense2(torch.relu(self.dense1(x.flatten(1))))


def tensors(spec: dict, layout: str):
    """The client's images [N, 3, 32, 32] uint8 in a layout, and its labels [N]."""
    batch = setting.random_images(spec["examples"])
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous(memory_format=LAYOUTS[layout])
    return images, torch.tensor(batch["label"]).long()


def make_epochs(spec: dict, layout: str):
    """count -> so many epochs of plain SGD on shuffled batches."""
    network = Network(spec).to(memory_format=LAYOUTS[layout])
    images, labels = tensors(spec, layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=spec["lr"])

    def run(count: int):
        for _ in range(count):
            for chosen in torch.randperm(len(labels)).split(spec["batch"]):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
                optimizer.step()

    return run


if __name__ == "__main__":
    torch.set_num_threads(1)
    variants = {f"torch, {layout}": make_epochs(serve.spec(), layout) for layout in LAYOUTS}
    serve.serve(f"torch {torch.__version__}", variants)
