"""The same curvature in curvlinops: its GGNLinearOperator on PyTorch, multiplied, and handed to scipy's eigsh.

`Peer` asks from the benchmark's own interpreter; the worker answers in one that has torch and curvlinops, which is
started as python -m benchmarks.curvlinops_worker FOLDER. Questions and answers are lines of JSON, arrays go by files.
The peer has its best setting: PyTorch's memory layout and the examples of a pass are those of its fastest product.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PASSES = (25, 50, 100, 0)  # examples of a pass that are tried; 0 takes all at once
LAYOUTS = ("contiguous_format", "channels_last")


class Peer:
    """curvlinops on a CNN of `fipa_jax.models`, given by its weights, on normalised images."""

    def __init__(self, python: str, weights: dict, images: np.ndarray, labels: np.ndarray):
        """Starts the worker.

        Args:
          python: an interpreter with torch, curvlinops and scipy.
          weights: {path: kernel}, such as `Conv_0/kernel` [3, 3, C, F] and `Dense_0/kernel` [F, K].
          images: [N, H, W, C] float32.
          labels: [N] int.

        Raises:
          RuntimeError: the worker does not start.
        """
        self._folder = tempfile.TemporaryDirectory()
        np.savez(Path(self._folder.name) / "setting.npz", images=images, labels=labels, **weights)
        self._worker = subprocess.Popen(
            [python, "-m", "benchmarks.curvlinops_worker", self._folder.name],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self._read()  # {versions, layout, examples a pass, loss}

    def product(self, width: int) -> float:
        """Seconds of one H V, V [P, width]."""
        return self._ask(do="product", width=width)["seconds"]

    def eigsh(self, rank: int, space: int, tolerance: float):
        """(eigenvalues [R], vectors [P, R], products) in our order, by eigsh with ncv = space, tol = tolerance."""
        products = self._ask(do="eigsh", rank=rank, space=space, tolerance=tolerance)["products"]
        with np.load(Path(self._folder.name) / "found.npz") as found:
            return found["eigenvalues"], found["vectors"], products

    def close(self) -> None:
        self._worker.communicate("")
        self._folder.cleanup()

    def _ask(self, **question) -> dict:
        self._worker.stdin.write(json.dumps(question) + "\n")
        self._worker.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError("the curvlinops worker has ended; its error is above")
        return json.loads(line)


def start(python: str, weights: dict, images: np.ndarray, labels: np.ndarray) -> Peer | None:
    """The peer, or None and a line that says why it is left out."""
    if not python:
        print("curvlinops is left out: name an interpreter that has it with --torch-python")
        return None
    try:
        peer = Peer(python, weights, images, labels)
    except (OSError, RuntimeError) as error:
        print(f"curvlinops is left out: {error}")
        return None
    print(", ".join(f"{name} {value}" for name, value in peer.about.items()), flush=True)
    return peer


def work(folder: Path) -> None:
    """Answers questions until its input ends."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with np.load(folder / "setting.npz") as saved:
        setting = dict(saved)
    matrix, about = fastest(setting)
    say(about)
    for line in sys.stdin:
        question = json.loads(line)
        if question.pop("do") == "product":
            columns = torch.randn(matrix.shape[1], question["width"])
            say({"seconds": seconds(lambda: matrix @ columns)})
        else:
            eigenvalues, vectors, products = eigsh(matrix, **question)
            shapes = [tuple(kernel.shape) for kernel in matrix._params]
            np.savez(folder / "found.npz", eigenvalues=eigenvalues, vectors=as_ours(vectors, shapes))
            say({"products": products})


def fastest(setting: dict):
    """The operator whose layout and passes make the fastest product with one column, and what it is."""
    import curvlinops
    import torch

    labels = torch.tensor(setting["labels"]).long()
    operators = {}
    for layout in LAYOUTS:
        memory_format = getattr(torch, layout)
        module = network(setting, memory_format)
        images = torch.tensor(setting["images"]).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
        for examples in PASSES:
            examples = min(examples or len(labels), len(labels))
            operators[layout, examples] = curvlinops.GGNLinearOperator(
                module,
                torch.nn.CrossEntropyLoss(reduction="mean"),
                list(module.parameters()),
                list(zip(images.split(examples), labels.split(examples), strict=True)),
                check_deterministic=False,
                num_data=len(labels),
            )
    column = torch.randn(next(iter(operators.values())).shape[1], 1)
    taken = {key: min(seconds(lambda: matrix @ column) for _ in range(3)) for key, matrix in operators.items()}
    layout, examples = min(taken, key=taken.get)
    about = {"torch": torch.__version__, "curvlinops": version("curvlinops-for-pytorch"), "layout": layout}
    return operators[layout, examples], about | {"examples a pass": examples}


def network(setting: dict, memory_format):
    """The CNN of `fipa_jax.models` in PyTorch's own layouts: convolutions, pooling, ReLU, dense layers, no biases."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            kernels = [torch.tensor(setting[name]) for name in sorted(setting) if name.startswith("Conv")]
            layout = functools.partial(torch.Tensor.contiguous, memory_format=memory_format)
            self.convolutions = nn.ParameterList([layout(kernel.permute(3, 2, 0, 1)) for kernel in kernels])
            kernels = [torch.tensor(setting[name]) for name in sorted(setting) if name.startswith("Dense")]
            self.dense = nn.ParameterList([kernel.T.contiguous() for kernel in kernels])

        def forward(self, x):
            for kernel in self.convolutions:
                x = torch.relu(torch.max_pool2d(torch.conv2d(x, kernel), 2))
            x = x.permute(0, 2, 3, 1).flatten(1)  # our order of the features
            *hidden, last = list(self.dense)  # a slice would copy the parameters, and lose their tangents
            for kernel in hidden:
                x = torch.relu(nn.functional.linear(x, kernel))
            return nn.functional.linear(x, last)

    return Network()


def eigsh(matrix, rank: int, space: int, tolerance: float):
    """(eigenvalues [R] from the largest, vectors [P, R], products) by scipy's Lanczos with restarts, in float32."""
    from scipy.sparse import linalg

    products = 0
    operator = matrix.to_scipy(dtype=np.float32)

    def counted(vector):
        nonlocal products
        products += 1
        return operator @ vector

    start = np.random.default_rng(0).standard_normal(matrix.shape[0]).astype(np.float32)
    counting = linalg.LinearOperator(operator.shape, matvec=counted, dtype=np.float32)
    eigenvalues, vectors = linalg.eigsh(counting, rank, which="LA", ncv=space, tol=tolerance, v0=start)
    order = np.argsort(-eigenvalues)
    return eigenvalues[order], vectors[:, order], products


def as_ours(vectors: np.ndarray, shapes: list[tuple]) -> np.ndarray:
    """Vectors [P, R] over PyTorch's kernels [F, C, 3, 3] and [K, F], in the order of ours [3, 3, C, F] and [F, K]."""
    parts = np.split(vectors, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    turned = []
    for part, shape in zip(parts, shapes, strict=True):
        axes = (2, 3, 1, 0, 4) if len(shape) == 4 else (1, 0, 2)
        turned.append(part.reshape(*shape, -1).transpose(axes).reshape(part.shape))
    return np.concatenate(turned)


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def say(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
