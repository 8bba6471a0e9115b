"""The networks, and the convolution that they share: `networks` and `convolution`."""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.models", "flax")
