"""What do a client's data pin down? Products with its Fisher matrix, eigenpairs, sketches."""

from fipa_jax.curvature.common_basis import Core, Image, make_core, make_image
from fipa_jax.curvature.contracts import Features, Loss, Outputs, check
from fipa_jax.curvature.eigenpairs import Eigenpairs, exact, lanczos, subspace
from fipa_jax.curvature.layer_factors import LayerFactors, make_layer_factors
from fipa_jax.curvature.products import Curvature, make_ggn, make_ggn_diagonal, make_gradient
from fipa_jax.curvature.sketch import (
    Diagonal,
    Report,
    Sketch,
    Sketcher,
    SketchFunction,
    TaskOutputs,
    keeping_energy,
    make_diagonal,
    make_sketch,
    plain,
    stored_as,
    truncate,
    with_rank_by_gradient,
)
from fipa_jax.curvature.sketchers import above_level, from_one_start, on_views, sent_seldom, within_link

__all__ = [
    "Core",
    "Curvature",
    "Diagonal",
    "Eigenpairs",
    "Features",
    "Image",
    "LayerFactors",
    "Loss",
    "Outputs",
    "Report",
    "Sketch",
    "SketchFunction",
    "Sketcher",
    "TaskOutputs",
    "above_level",
    "check",
    "exact",
    "from_one_start",
    "keeping_energy",
    "lanczos",
    "make_core",
    "make_diagonal",
    "make_ggn",
    "make_ggn_diagonal",
    "make_gradient",
    "make_image",
    "make_layer_factors",
    "make_sketch",
    "on_views",
    "plain",
    "sent_seldom",
    "stored_as",
    "subspace",
    "truncate",
    "with_rank_by_gradient",
    "within_link",
]
