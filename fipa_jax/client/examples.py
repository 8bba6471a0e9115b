"""Which examples does a client own, and how are they read? Indices, padded and masked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fipa_jax.curvature import contracts


class Client(NamedTuple):
    """Which examples of the data set a client owns; stacked over clients: [T, N] and [T]."""

    indices: jax.Array  # [N] int32, padded by valid indices
    num_examples: jax.Array  # [], so many of the indices, the first ones, are its own


def check(client: Client, data: dict) -> None:
    """Refuses, with a ValueError, a client whose examples are not in the data; what is traced passes."""
    number, (indices, own) = contracts.num_examples(data), client
    if contracts.is_known(indices) and not np.all((np.asarray(indices) >= 0) & (np.asarray(indices) < number)):
        raise ValueError(f"client.indices: needed places of the {number} examples, 0 to {number - 1}, got {indices}")
    if contracts.is_known(own) and not 0 <= np.asarray(own) <= np.shape(indices)[0]:
        raise ValueError(f"client.num_examples: needed 0 to {np.shape(indices)[0]}, its indices, got {own}")


def gather(data: dict, indices: jax.Array) -> dict:
    """The examples at `indices` of every field: {field: [N_total, ...]} -> {field: [B, ...]}."""
    return {name: field[indices] for name, field in data.items()}


@jax.jit
def take(stacked, ids):
    """Rows `ids` of every leaf: of all clients' [T, ...] the cohort's [C, ...]."""
    return jax.tree.map(lambda leaf: leaf[ids], stacked)


def present(client: Client) -> jax.Array:
    """[N] bool: which of the padded examples are the client's own."""
    return jnp.arange(client.indices.shape[0]) < client.num_examples


def own_indices(client: Client) -> jax.Array:
    """[N], the indices of a client's examples, padded by its first one: no example of others reaches its network."""
    return jnp.where(present(client), client.indices, client.indices[0])


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """[], the mean of values [B] where the mask [B] holds; 0 where it holds nowhere.

    Raises:
      ValueError: there is not one value for each entry of the mask.
    """
    if values.shape != mask.shape:
        raise ValueError(f"needed one value per example, shape {mask.shape}, got {values.shape}")
    return jnp.sum(jnp.where(mask, values, 0)) / jnp.maximum(jnp.sum(mask), 1)


def subsample(key, client: Client, examples: int) -> Client:
    """A client with at most `examples` of its own examples, drawn without replacement; 0 keeps all."""
    size = client.indices.shape[0]
    if not 0 < examples < size:
        return client
    draw = jnp.where(present(client), jax.random.uniform(key, [size]), 2.0)
    return Client(client.indices[jnp.argsort(draw)[:examples]], jnp.minimum(client.num_examples, examples))
