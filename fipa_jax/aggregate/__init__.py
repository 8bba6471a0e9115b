"""How do uploads become one step of the global model? Screening, averages, FIPA, past rounds, trust region."""

from fipa_jax.aggregate.aggregator import Aggregator, Needs, compare, step_of, weights_of
from fipa_jax.aggregate.fisher_informed import INFO, FipaState, fipa, fipa_step, from_solver
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.limits import Limits, capped, limited
from fipa_jax.aggregate.past_rounds import Kind, PastRounds, latest, prior, remembering, targets
from fipa_jax.aggregate.robust import geometric_median, krum, median, multi_krum, trimmed_mean
from fipa_jax.aggregate.rules import AGGREGATORS, diagonal, mean
from fipa_jax.aggregate.screening import REASONS, Received, receive
from fipa_jax.aggregate.solvers import FALLBACKS, Messages, Now, Solution, Solver, check_order, damped, pinv, tikhonov
from fipa_jax.aggregate.trust import trust_region
from fipa_jax.aggregate.uploads import Uploads, collect

__all__ = [
    "AGGREGATORS",
    "FALLBACKS",
    "INFO",
    "REASONS",
    "Aggregator",
    "FipaState",
    "Kind",
    "LateUpdates",
    "Limits",
    "Messages",
    "Needs",
    "Now",
    "PastRounds",
    "Received",
    "Solution",
    "Solver",
    "Uploads",
    "capped",
    "check_order",
    "collect",
    "compare",
    "damped",
    "diagonal",
    "fipa",
    "fipa_step",
    "from_solver",
    "geometric_median",
    "krum",
    "latest",
    "limited",
    "mean",
    "median",
    "multi_krum",
    "pinv",
    "prior",
    "receive",
    "remembering",
    "step_of",
    "targets",
    "tikhonov",
    "trimmed_mean",
    "trust_region",
    "weights_of",
]
