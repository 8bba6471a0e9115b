"""A config becomes a run: the only package that imports all sides.

`phase_parts` makes a config's names into functions, `experiment` is a config made real, `programs` are its compiled
stages, `loop` goes through a phase, `whole_run` through all; `head_features` serves phases of the head alone.
"""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.run", "flax", "matplotlib", "ml_collections", "orbax", "tqdm")
