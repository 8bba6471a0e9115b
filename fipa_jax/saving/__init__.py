"""What outlives a process? Checkpoints, models, and the rows of a run that goes on where it was stopped.

`checkpoints` writes and reads steps, `journal` says when and what, `resume` looks what a work directory holds already,
`provenance` says what a run comes from, `signals` stops it, `model_files` exports a model.
"""

from fipa_jax import installed

installed.check("experiments", "fipa_jax.saving", "flax", "ml_collections", "orbax")
