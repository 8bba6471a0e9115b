"""What one faulty client of five does to the step: `benchmark.py robust`.

Each fault in every rule: whether the client is left out, and how far the step is from the one without it. Then its
eigenvalues times a factor, which no check can tell from a sound client's: how far it moves the step, by the caps.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from fipa_jax import aggregate
from fipa_jax.aggregate.fisher_informed import FORMS
from fipa_jax.curvature.sketch import Diagonal, Sketch

CLIENTS = 5
RULES = {
    "mean": aggregate.mean(),
    "diagonal": aggregate.diagonal(),
    **{form: aggregate.fipa(form) for form in sorted(FORMS)},
}
FAULTS = {
    "update NaN": ("delta", lambda x: x.at[0].set(jnp.nan)),
    "update infinite": ("delta", lambda x: x.at[0].set(jnp.inf)),
    "update's norm overflows": ("delta", lambda x: jnp.full_like(x, jnp.finfo(x.dtype).max ** 0.6)),
    "eigenvalue NaN": ("eigenvalues", lambda x: x.at[0].set(jnp.nan)),
    "basis NaN": ("basis", lambda x: x.at[0, 0].set(jnp.nan)),
    "eigenvalue negative": ("eigenvalues", lambda x: x.at[-1].set(-x[0])),
    "basis not orthonormal": ("basis", lambda x: x.at[:, 1].set(x[:, 0])),
    "number of examples invalid": ("counts", lambda x: -x),
}


def run(options: list[str]) -> dict:
    """Prints and returns both tables."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py robust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1000, help="parameters, P")
    parser.add_argument("--rank", type=int, default=20, help="R")
    parser.add_argument("--scale", type=float, default=1e6, help="of the last client's eigenvalues")
    parser.add_argument("--damping", type=float, default=1e-3, help="relative to H's largest eigenvalue")
    args = parser.parse_args(options)
    sound = make_clients(args.size, args.rank)
    checked = [check(sound, fault) for fault in FAULTS]
    print(f"the last of {CLIENTS} clients at fault: distance of the step from the one without it, over its length")
    timing.table(checked)
    moved = movements(sound, args.scale, args.damping)
    print(f"\nits eigenvalues times {args.scale:g}, damped form: how far it moves the step, over the longest update")
    timing.table(moved)
    return {"setting": vars(args), "faults": checked, "scaled": moved}


def make_clients(size: int, rank: int, seed: int = 0) -> dict:
    """{field: [C, ...]}: half of the subspaces is shared, updates are a common direction and as much of their own."""
    draw = np.random.default_rng(seed)
    common, shared = draw.normal(size=size), draw.normal(size=(size, rank // 2))
    own = draw.normal(size=(CLIENTS, size, rank - rank // 2))
    basis = np.linalg.qr(np.concatenate([np.broadcast_to(shared, (CLIENTS, *shared.shape)), own], axis=2))[0]
    found = {
        "delta": common + draw.normal(size=(CLIENTS, size)),
        "eigenvalues": np.geomspace(1, 1e-3, rank) * draw.uniform(0.5, 2, (CLIENTS, 1)),
        "basis": basis,
        "counts": np.full(CLIENTS, 100.0),
    }
    return {name: jnp.asarray(field, jnp.float32) for name, field in found.items()}


def step_of(rule, clients: dict):
    """(step [P], info) of a rule."""
    if rule.needs.curvature == "diagonal":
        sent = Diagonal(jnp.einsum("cpr,cr->cp", clients["basis"] ** 2, clients["eigenvalues"]))
    else:
        sent = Sketch(clients["eigenvalues"], clients["basis"])
    params = jnp.zeros(clients["delta"].shape[1])
    uploads = aggregate.Uploads(clients["delta"], clients["counts"], sent)

    @jax.jit
    def apply(uploads, state):
        received, info = aggregate.receive(uploads, params)
        step, _, info, _ = aggregate.step_of(rule, received, state, params, info)
        return step, info

    step, info = apply(uploads, rule.init(params))
    return np.asarray(step), info


def spoil(clients: dict, field: str, change) -> dict:
    """The clients, a field of the last one changed."""
    return clients | {field: clients[field].at[-1].set(change(clients[field][-1]))}


def check(sound: dict, fault: str) -> dict:
    """A line of the first table; a diagonal has no basis that might not be orthonormal."""
    row = {"fault": fault}
    for name, rule in RULES.items():
        if name == "diagonal" and fault == "basis not orthonormal":
            continue
        wanted, _ = step_of(rule, spoil(sound, "counts", jnp.zeros_like))
        step, info = step_of(rule, spoil(sound, *FAULTS[fault]))
        left_out = info["rejected"].tolist() == [False] * (CLIENTS - 1) + [True]
        row[name] = float(np.linalg.norm(step - wanted) / np.linalg.norm(wanted)) if left_out else "taken"
    return row


def movements(sound: dict, scale: float, damping: float) -> list[dict]:
    """The second table, a line for each damping and cap: the movement beside its bounds, see `aggregate.capped`."""
    scaled, without = (spoil(sound, "eigenvalues", lambda x: scale * x), spoil(sound, "counts", jnp.zeros_like))
    longest = float(jnp.max(jnp.linalg.norm(sound["delta"], axis=1)))
    traces = np.sort(np.asarray(jnp.sum(scaled["eigenvalues"], axis=1)))
    absolute = damping * float(sound["eigenvalues"].max()) / 2
    rows = []
    for relative in (True, False):
        for cap in (0.0, 1000.0, 10.0):
            limits = aggregate.Limits(trace_cap=cap)
            rule = aggregate.fipa(damping=damping if relative else absolute, relative=relative, limits=limits)
            (step, info), (alone, _) = step_of(rule, scaled), step_of(rule, without)
            distance = float(np.linalg.norm(sound["delta"][-1] - alone))
            kappa = (min(cap or np.inf, traces[-1] / traces[2]) * traces[2] + absolute) / CLIENTS
            rows.append(
                {
                    "damping": "relative" if relative else "absolute",
                    "trace_cap": f"{cap:g}",
                    "capped": int(info["capped"].sum()),
                    "moved / longest": float(np.linalg.norm(step - alone)) / longest,
                    "bound by max_step": 2 * limits.max_step,
                    "in A": in_others(sound, step - alone, absolute),
                    "bound by the cap": np.inf if relative else float(np.sqrt(kappa) / 2 * distance),
                }
            )
    return rows


def in_others(sound: dict, x, beta: float) -> float:
    """|x|_A with A = sum_m w_m (H_m + beta I) over the clients but the last."""
    along = np.einsum("cpr,p->cr", np.asarray(sound["basis"], float)[:-1], x)
    values = np.asarray(sound["eigenvalues"], float)[:-1]
    return float(np.sqrt((np.sum(values * along**2) + (CLIENTS - 1) * beta * (x @ x)) / CLIENTS))
