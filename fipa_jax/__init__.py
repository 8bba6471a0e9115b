"""Federated learning in JAX where the server knows which parameters each client's data pins down.

Implements FIPA, Fisher-Informed Parameterwise Aggregation (arXiv 2601.13608), as pure functions. A part of the package
is imported when it is first asked for (PEP 562), and nothing before: `fipa_jax.aggregate` needs no `import` of its own.

Public are the names that a part lists in its `__all__`; in a part without one, those of its modules that have no
leading underscore; and the fields of the config.

Example:
  import fipa_jax
  rule = fipa_jax.aggregate.fipa(form="damped")
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fipa_jax import (
        aggregate,
        client,
        config,
        curvature,
        data,
        deployment,
        federation,
        models,
        privacy,
        reporting,
        run,
        saving,
        tasks,
        trees,
    )

__version__ = "0.2.0"
__all__ = [
    "__version__",
    "aggregate",
    "client",
    "config",
    "curvature",
    "data",
    "deployment",
    "federation",
    "models",
    "privacy",
    "reporting",
    "run",
    "saving",
    "tasks",
    "trees",
]


def __getattr__(name: str):
    """A part of the package, imported now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    """The parts of the package, imported or not."""
    return __all__
