"""What do a client's data pin down? Products with its Fisher matrix, eigenpairs, sketches."""

from fipa_jax.curvature.products import Curvature, make_diagonal, make_ggn, make_gradient
from fipa_jax.curvature.sketch import Diagonal, Report, Sketch, make_sketch

__all__ = ["Curvature", "Diagonal", "Report", "Sketch", "make_diagonal", "make_ggn", "make_gradient", "make_sketch"]
