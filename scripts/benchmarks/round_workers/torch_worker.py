"""One client's epoch in plain PyTorch, in both memory layouts, and the networks that the peers on PyTorch share.

The networks name their layers as those of `fipa_jax.models` do, and start from our weights.
"""

import functools
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from benchmarks import setting
from benchmarks.round_workers import serve

LAYOUTS = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class CNN(nn.Module):
    """The CNN of `fipa_jax.models`: 3x3 convolutions with pooling and ReLU, one hidden layer, no biases."""

    def __init__(self, spec: dict):
        super().__init__()
        first, second = spec["channels"]
        self.Conv_0 = nn.Conv2d(3, first, 3, bias=False)
        self.Conv_1 = nn.Conv2d(first, second, 3, bias=False)
        self.Dense_0 = nn.Linear(second * 6 * 6, spec["hidden"], bias=False)
        self.Dense_1 = nn.Linear(spec["hidden"], spec["classes"], bias=False)

    def forward(self, images):  # uint8
        x = torch.relu(torch.max_pool2d(self.Conv_0(normalised(images)), 2))
        x = torch.relu(torch.max_pool2d(self.Conv_1(x), 2))
        return self.Dense_1(torch.relu(self.Dense_0(x.flatten(1))))


class ResNet(nn.Sequential):
    """The ResNet of `fipa_jax.models`: a 3x3 stem, stages of basic blocks, average pooling, a head of one layer."""

    def __init__(self, spec: dict):
        width = spec["widths"][0]
        layers = {"stem": ConvNorm(3, width), "relu": nn.ReLU(inplace=True)}
        for i, after in enumerate(spec["widths"]):
            for j in range(spec["blocks"]):
                layers[f"stage{i + 1}_block{j + 1}"] = Block(width, after, 2 if i > 0 and j == 0 else 1)
                width = after
        layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(width, spec["classes"])}
        super().__init__(OrderedDict(layers))

    def forward(self, images):  # uint8
        return super().forward(normalised(images))


class Block(nn.Module):
    """Two convolutions and a shortcut, by a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1 = ConvNorm(before, after, 3, stride)
        self.conv2 = ConvNorm(after, after)
        self.shortcut = ConvNorm(before, after, 1, stride) if stride > 1 or before != after else nn.Identity()

    def forward(self, x):
        return torch.relu_(self.conv2(torch.relu_(self.conv1(x))) + self.shortcut(x))


class ConvNorm(nn.Sequential):
    """A convolution without bias and its normalisation in two groups."""

    def __init__(self, before: int, after: int, kernel: int = 3, stride: int = 1):
        conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(OrderedDict(Conv_0=conv, GroupNorm_0=nn.GroupNorm(2, after)))


def normalised(images):
    """Pixels [B, 3, 32, 32] uint8 -> floats."""
    return (images.float() / 255 - 0.5) / 0.25


def with_our_weights(network: nn.Module, spec: dict, layout: str) -> nn.Module:
    """The network in a layout, with the weights in spec["weights"]: {path of `fipa_jax.trees.paths`: leaf} by np.savez.

    Raises:
      RuntimeError: its parameters have other names or shapes than ours.
    """
    state = {}
    with np.load(spec["weights"]) as saved:
        for path, leaf in saved.items():
            if path == "Dense_0/kernel":  # [H W C, F], where PyTorch flattens to C H W
                leaf = leaf.reshape(6, 6, -1, leaf.shape[1]).transpose(2, 0, 1, 3).reshape(leaf.shape)
            *layers, name = path.split("/")
            leaf = leaf.transpose((3, 2, 0, 1)) if leaf.ndim == 4 else leaf.T
            state[".".join([*layers, NAMES[name]])] = torch.tensor(leaf)
    network.load_state_dict(state)
    return network.to(memory_format=LAYOUTS[layout])


def make_network(spec: dict, layout: str) -> nn.Module:
    """The network that the spec describes."""
    return with_our_weights(ResNet(spec) if "widths" in spec else CNN(spec), spec, layout)


@torch.no_grad()
def logits(network: nn.Module, spec: dict) -> list:
    """[B, K] of the first batch."""
    return network(tensors(spec["examples"], "default")[0][: spec["batch"]]).tolist()


@functools.cache
def tensors(examples: int, layout: str):
    """The client's images [N, 3, 32, 32] uint8 in a layout, and its labels [N]."""
    batch = setting.random_images(examples)
    images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous(memory_format=LAYOUTS[layout])
    return images, torch.tensor(batch["label"]).long()


def train(network: nn.Module, spec: dict, layout: str, epochs: int = 1) -> None:
    """Epochs of plain SGD on shuffled batches."""
    images, labels = tensors(spec["examples"], layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=spec["lr"])
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(spec["batch"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    spec = serve.spec()
    networks = {layout: make_network(spec, layout) for layout in LAYOUTS}
    variants = {
        f"torch, {layout}": functools.partial(train, network, spec, layout) for layout, network in networks.items()
    }
    serve.serve(f"torch {torch.__version__}", variants, logits(networks["default"], spec))
