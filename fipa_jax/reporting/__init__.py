"""What does a person see of a run?

Its figures (`metrics`), lines and tables (`console`), pictures (`curves`, `plots`), and a page on all of it (`report`);
whoever else is told its rows (`hooks`, `writers`).
"""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.reporting", "absl", "ml_collections", "tqdm")
