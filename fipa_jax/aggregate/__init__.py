"""How do uploads become one step of the global model? Screening, averages, FIPA, past rounds, trust region."""

from fipa_jax.aggregate.adaptive_damping import adaptive
from fipa_jax.aggregate.aggregator import Aggregator, Needs, compare, step_of, weights_of
from fipa_jax.aggregate.curvature_budget import BudgetState, within_budget
from fipa_jax.aggregate.fisher_informed import INFO, FipaState, fipa, fipa_step, from_solver
from fipa_jax.aggregate.gradient_span import INFO_OF_SPAN, SpanOptions, from_span
from fipa_jax.aggregate.late_updates import LateUpdates
from fipa_jax.aggregate.layerwise import INFO_OF_LAYERS, LayerOptions, kronecker
from fipa_jax.aggregate.limits import Limits, capped, limited
from fipa_jax.aggregate.past_rounds import Kind, PastRounds, latest, prior, remembering, targets
from fipa_jax.aggregate.posteriors import PosteriorOptions, posterior
from fipa_jax.aggregate.robust import geometric_median, krum, median, multi_krum, trimmed_mean
from fipa_jax.aggregate.rules import AGGREGATORS, diagonal, mean
from fipa_jax.aggregate.screening import REASONS, Received, receive
from fipa_jax.aggregate.solvers import FALLBACKS, Messages, Now, Solution, Solver, check_order, damped, pinv, tikhonov
from fipa_jax.aggregate.sum_rule import from_sums
from fipa_jax.aggregate.sums import (
    INFO_OF_SUMS,
    Row,
    SumOptions,
    SumSolver,
    row_of,
    sum_solver,
)
from fipa_jax.aggregate.trust import trust_region
from fipa_jax.aggregate.uploads import Uploads, collect

__all__ = [
    "AGGREGATORS",
    "FALLBACKS",
    "INFO",
    "INFO_OF_LAYERS",
    "INFO_OF_SPAN",
    "INFO_OF_SUMS",
    "REASONS",
    "Aggregator",
    "BudgetState",
    "FipaState",
    "Kind",
    "LateUpdates",
    "LayerOptions",
    "Limits",
    "Messages",
    "Needs",
    "Now",
    "PastRounds",
    "PosteriorOptions",
    "Received",
    "Row",
    "Solution",
    "Solver",
    "SpanOptions",
    "SumOptions",
    "SumSolver",
    "Uploads",
    "adaptive",
    "capped",
    "check_order",
    "collect",
    "compare",
    "damped",
    "diagonal",
    "fipa",
    "fipa_step",
    "from_solver",
    "from_span",
    "from_sums",
    "geometric_median",
    "kronecker",
    "krum",
    "latest",
    "limited",
    "mean",
    "median",
    "multi_krum",
    "pinv",
    "posterior",
    "prior",
    "receive",
    "remembering",
    "row_of",
    "step_of",
    "sum_solver",
    "targets",
    "tikhonov",
    "trimmed_mean",
    "trust_region",
    "weights_of",
    "within_budget",
]
