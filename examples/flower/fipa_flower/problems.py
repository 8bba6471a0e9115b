"""What server and clients agree on, from the same few settings: the sine task, or four hospitals."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fipa_jax import config as config_lib
from fipa_jax import installed

config_lib.prepare_process()

import jax  # noqa: E402

from fipa_jax.deployment.agreement import Agreement, agree  # noqa: E402
from fipa_jax.models import networks  # noqa: E402
from fipa_jax.reporting import metrics  # noqa: E402
from fipa_jax.tasks import own_data, task  # noqa: E402

HOSPITALS = 4


class Federation(NamedTuple):
    """A problem, seen from one of its ends."""

    config: object
    agreement: Agreement
    own: Callable[[int], dict]  # client -> {field: [N, ...]}, its examples; each may ask for its own alone
    test: Callable[[], dict]  # the server's
    figures: Callable[[dict, dict], dict]  # (params, test set) -> {name: number}
    width: int = 0  # see `deployment.site.Site`


def named(settings: dict) -> Federation:
    """The federation that the settings of a run name."""
    return PROBLEMS[settings["problem"]](settings)


def _config(name: str, settings: dict):
    """A config of the package, with as many rounds as the run has."""
    config = runpy.run_path(str(installed.folder("configs") / f"{name}.py"))["get_config"]()
    config.fipa.rounds = settings["rounds"]
    return config


def _sine(settings: dict) -> Federation:
    """Some clients; everybody makes all data from the seed, and takes its own."""
    config = _config("sine", settings)
    config.task.num_clients = settings["clients"]
    problem = task.build(config)

    def own(client: int) -> dict:
        return {name: field[np.asarray(problem.clients[client])] for name, field in problem.train.items()}

    agreed = agree(
        config, problem.task, len(problem.clients), problem.test, spec=settings["method"], late=settings["late"]
    )
    return Federation(config, agreed, own, lambda: problem.test, _figures(config, problem.task, agreed))


def _hospitals(settings: dict) -> Federation:
    """Four hospitals; each has the file of its own rows, the server that of the test rows: see `prepare.py`."""
    config, folder = _config("heart_disease", settings), Path(settings["data"])
    blank = {"x": np.zeros([1, 13]), "label": np.zeros([1], np.int32)}
    learned = own_data.classifier(networks.build(config.model, num_outputs=1), blank["x"][0])
    agreed = agree(config, learned, HOSPITALS, blank, spec=settings["method"], late=settings["late"])

    def own(client: int) -> dict:
        return dict(np.load(folder / f"hospital-{client}.npz"))

    return Federation(
        config, agreed, own, lambda: dict(np.load(folder / "test.npz")), _figures(config, learned, agreed)
    )


PROBLEMS = {"hospitals": _hospitals, "sine": _sine}


def _figures(config, learned: task.Task, agreed: Agreement) -> Callable[[dict, dict], dict]:
    evaluate = jax.jit(metrics.make_evaluate(learned, config.eval.batch_size))

    def figures(params, test):
        with agreed.precision():
            return metrics.overall(evaluate(params, jax.tree.map(jax.numpy.asarray, test)), "test", learned.figures)

    return figures
