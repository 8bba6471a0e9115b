"""What does a person see of a run? Its figures (`metrics`), lines and tables (`console`), pictures (`plots`)."""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.reporting", "absl", "ml_collections", "tqdm")
