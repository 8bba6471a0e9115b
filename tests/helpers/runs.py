"""The config of a whole run that takes a second, for tests of what is around the mathematics."""

from fipa_jax import config as config_lib


def tiny(**fields):
    """Two rounds of the sine task; `fields` replace those of the config."""
    config = config_lib.default()
    config.task.examples_per_client = 8
    config.model.widths = (3,)
    config.fipa.rounds = 2
    config.fipa.sketch.rank = 3
    config.eval.batch_size = 1000
    config.update(fields)
    return config
