"""How are many clients run? Stacked, padded and masked, and mapped in chunks over one or several devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def replicate(tree, mesh: Mesh | None):
    """The arrays of a tree on the device, or whole on every device of the mesh, also on those of other processes.

    All processes give the same arrays; that is not checked, and nothing is sent.
    """
    if mesh is None:
        return jax.device_put(tree)
    return put(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def put(tree, places):
    """The arrays of a tree where `places`, a tree of shardings like it, says; see `replicate`."""

    def one(leaf, place):
        if isinstance(leaf, int | float):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(leaf), place))
        leaf = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
        return jax.make_array_from_callback(leaf.shape, place, lambda index: leaf[index])

    return jax.tree.map(one, tree, places)


ByRows = Callable[[Any], Any]  # results -> a tree of bools like them


def by_none(results: Any) -> Any:
    """All results are gathered."""
    return jax.tree.map(lambda _: False, results)


def map_clients(
    fn: Callable,
    common: tuple,
    *args,
    sizes: jax.Array | None = None,
    wanted: jax.Array | None = None,
    chunk: int = 1,
    mesh: Mesh | None = None,
    by_rows: ByRows = by_none,
):
    """Applies `fn(*common, *client)` to every client, and stacks the results [C, ...] in the clients' order.

    Args:
      fn: the program of one client. Arrays that it needs come as arguments: over a mesh it must not close over them.
      common: pytrees that are the same for all clients.
      *args: stacked pytrees, a leading clients axis [C, ...] on each leaf.
      sizes: [C], what each client's work is about proportional to, such as `num_examples`. Clients side by side take as
        long as the largest of them, and devices as long as the one with most to do: by their sizes those that go
        together are nearly equal, and every device gets its share of large and small ones.
      wanted: [C] bool, the clients that work; the others' results are zeros and cost nothing. None for all.
      chunk: clients side by side in one `vmap`; 1 runs one client's program after another, 0 all at once.
      mesh: devices with an axis `clients`, over which the clients are spread; C is padded to a multiple of it by
        repeating a client whose results are dropped. The result does not depend on it.
      by_rows: which of the results are exchanged over a mesh so that each device has some rows of all clients' arrays,
        [C, P / devices, ...]; all others are gathered whole on every device.
    """
    clients = jax.tree.leaves(args)[0].shape[0]
    if wanted is not None:  # first, so that chunks and devices share them evenly
        sizes, args = jnp.where(wanted, 1 if sizes is None else sizes, -1), (*args, wanted)

    def local(common, args):
        if wanted is not None:
            return _of_wanted(lambda *one: fn(*common, *one), args[:-1], args[-1], chunk)
        count = jax.tree.leaves(args)[0].shape[0]
        if chunk == 0 or chunk >= count > 1:
            return jax.vmap(lambda *one: fn(*common, *one))(*args)
        return jax.lax.map(lambda one: fn(*common, *one), args, batch_size=None if chunk == 1 else chunk)

    if mesh is None and (sizes is None or chunk in (0, 1)):
        return local(common, args)
    devices = 1 if mesh is None else mesh.shape["clients"]
    by_size = jnp.arange(clients) if sizes is None else jnp.argsort(-sizes)  # [C], the largest first
    dealt = deal(clients + -clients % devices, devices)
    spread_out = jax.tree.map(lambda leaf: leaf[by_size[np.minimum(dealt, clients - 1)]], args)
    place = jnp.asarray(np.argsort(dealt))[jnp.argsort(by_size)]  # [C], where each client has come to
    if mesh is None:
        return jax.tree.map(lambda leaf: leaf[place], local(common, spread_out))
    everywhere, split = PartitionSpec(), PartitionSpec("clients")
    run = jax.shard_map(local, mesh=mesh, in_specs=(everywhere, split), out_specs=split, check_vma=False)
    # Every device gets all results: a sum over clients that is itself spread would change its order with the devices.
    results = run(common, spread_out)
    rows = NamedSharding(mesh, PartitionSpec(None, "clients"))

    def collect(leaf, is_by_rows):
        placed = rows if is_by_rows else NamedSharding(mesh, everywhere)
        ordered = jax.lax.with_sharding_constraint(leaf, placed)[place]
        return jax.lax.with_sharding_constraint(ordered, placed)

    return jax.tree.map(collect, results, by_rows(results))


def _of_wanted(fn: Callable, args: tuple, wanted: jax.Array, chunk: int):
    """fn(*client) of the clients that are wanted, stacked [C, ...], in a loop that ends with the last of them."""
    clients = wanted.shape[0]
    at_once = clients if chunk == 0 else min(chunk, clients)
    shapes = jax.eval_shape(lambda args: fn(*jax.tree.map(lambda leaf: leaf[0], args)), args)
    blank = jax.tree.map(lambda leaf: jnp.zeros([clients, *leaf.shape], leaf.dtype), shapes)
    order = jnp.argsort(~wanted)
    # Beside the last of them the first one runs once more, and nothing is written of that.
    places = jnp.pad(jnp.where(wanted[order], order, clients), (0, -clients % at_once), constant_values=clients)

    def turn(i, results):
        here = jax.lax.dynamic_slice_in_dim(places, i * at_once, at_once)
        own = jax.tree.map(lambda leaf: leaf[jnp.where(here < clients, here, order[0])], args)
        if at_once == 1:
            found = jax.tree.map(lambda leaf: leaf[None], fn(*jax.tree.map(lambda leaf: leaf[0], own)))
        else:
            found = jax.vmap(fn)(*own)
        return jax.tree.map(lambda all_, new: all_.at[here].set(new, mode="drop"), results, found)

    return jax.lax.fori_loop(0, -(-jnp.sum(wanted) // at_once), turn, blank)


def deal(count: int, hands: int) -> np.ndarray:
    """[count] ranks, one hand's after another's, dealt in turns there and back, so that all hands are about as good.

    Example:
      deal(6, 2) is [0, 3, 4, 1, 2, 5].
    """
    turns = np.arange(count).reshape(-1, hands)
    turns[1::2] = turns[1::2, ::-1]
    return turns.T.reshape(-1)


def make_mesh(devices: int):
    """`devices` devices, 0 for all, along an axis `clients`; None for one.

    Raises:
      ValueError: there are fewer, or a process of several would be left without one.
    """
    devices = devices or len(jax.devices())
    if jax.process_count() > 1 and devices != len(jax.devices()):
        raise ValueError(f"config.devices: {jax.process_count()} processes use all their devices; set it to 0")
    if devices == 1:
        return None
    if devices > len(jax.devices()):
        raise ValueError(
            f"config.devices: {devices} asked for, {len(jax.devices())} there; on a CPU, set in the environment "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
        )
    return jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
