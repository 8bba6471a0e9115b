"""What would a client of yours give away? Its inputs, its membership and its labels, rebuilt from what it sends.

  python scripts/leak.py --config=configs/digits.py --examples 1 8 32 128 --picture=leak.png

It takes the model and the examples of a config, and clients of N examples each (--client: one of the config's own).
Each takes one step of gradient descent and sends its update; besides, what a message of FIPA holds: eigenpairs of some
ranks, in bfloat16 too, or a product with a common basis, summed over a cohort. A line of the table is one message:

inputs      share of the inputs of the first dense layer rebuilt within 5 %; error: the median relative error
member      area under the curve that tells the client's examples from others; 0.5 is a guess
labels      share of the labels found: by the update and the rebuilt inputs; by the update alone, which raises one class
exposure    examples of the cohort over min(s, d + 1): far above 1 a sum protects the inputs of a layer of d

It does not apply to layers that see an example more than once (convolutions, sequences): there it says so. All of it is
computed in float64, by an attacker who knows the model: fipa_jax/privacy/leak.py has the equations.
"""

import argparse
import ast
import contextlib
import runpy
import sys
from pathlib import Path

from fipa_jax import config as config_lib

config_lib.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

from fipa_jax import trees  # noqa: E402
from fipa_jax.aggregate.sums import nystrom  # noqa: E402
from fipa_jax.config import command_line  # noqa: E402
from fipa_jax.curvature import common_basis, products, sketch  # noqa: E402
from fipa_jax.models.networks import Features  # noqa: E402
from fipa_jax.privacy import leak  # noqa: E402
from fipa_jax.run import experiment  # noqa: E402


def at_least(low):
    """The type of an argument: a whole number from `low` on."""

    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"needs at least {low}, got {text}")
        return int(text)

    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--set", nargs="*", default=[], help="fields of the config, such as model.widths=(32,)")
    parser.add_argument("--examples", nargs="+", type=at_least(1), default=[1, 8, 32, 128], help="N of a client")
    parser.add_argument("--client", type=at_least(0), help="one of the config's own, instead")
    parser.add_argument("--ranks", nargs="+", type=at_least(1), default=[10, 50])
    parser.add_argument("--columns", type=at_least(1), default=50, help="s, of a common basis")
    parser.add_argument("--cohort", type=at_least(2), default=10, help="clients in a sum")
    parser.add_argument("--noise", type=float, default=1.0, help="noise multiplier of the noisy messages")
    parser.add_argument("--draws", type=at_least(1), default=3, help="of the clients")
    parser.add_argument("--layer", type=at_least(0), default=0, help="which dense layer, the first is 0")
    parser.add_argument("--picture", default="", help="file for true and rebuilt images, such as leak.png")
    args = parser.parse_args()
    try:
        with jax.enable_x64(True):
            report(args)
    except (ValueError, KeyError, TypeError, OSError) as error:
        sys.exit(f"error: {error if isinstance(error, OSError) else error.args[0]}")


def report(args) -> None:
    """Prints the table, and what it means."""
    attack = Attack(args)
    print(f"{args.config}: {attack.described}")
    print(f"{'N':>5}  {'message':<28}{'inputs':>8}{'error':>10}{'member':>8}{'labels':>8}{'exposure':>10}")
    sizes = args.examples if args.client is None else [0]
    for size in sizes:
        draws = [attack.of_client(size, draw) for draw in range(args.draws if args.client is None else 1)]
        for message in draws[0]:
            values = np.array([draw[message] for draw in draws], float)
            shown = [np.nan if np.all(np.isnan(column)) else np.nanmean(column) for column in values.T]
            cells = [
                f"{shown[0]:8.0%}",
                f"{shown[1]:10.1e}",
                f"{shown[2]:8.2f}",
                f"{shown[3]:8.0%}",
                f"{shown[4]:10.2g}",
            ]
            print(f"{attack.size:>5}  {message:<28}" + "".join(f"{'-':>{len(c)}}" if "nan" in c else c for c in cells))
    print(WORDS)
    if args.picture:
        attack.draw(args.picture)


OTHERS = 128  # examples at most that are not the client's, to tell its own from
WORDS = """
What this means: where `inputs` is near 100 %, whoever reads that message has the examples themselves, and no rounding
to bfloat16 helps. Where `member` is near 1 it can be told whether a known example is among the client's. A secure sum
hides single clients, but at an exposure below 1 its total still gives the examples away. Noise that gives differential
privacy protects both; see docs/guides/private.md. A low figure is no proof: a better attack may do better."""


class Attack:
    """The model and the examples of a config, in float64, as an attacker sees them."""

    def __init__(self, args):
        file, _, variant = args.config.partition(":")
        config = runpy.run_path(str(command_line.config_file(file)))["get_config"](*([variant] if variant else []))
        for given in args.set:
            path, _, value = given.partition("=")
            with contextlib.suppress(SyntaxError, ValueError):  # then it is a string
                value = ast.literal_eval(value)
            config.update_from_flattened_dict({path: value})
        config.precision, config.compare, config.fipa.rounds = "float64", ("fedavg",), 1
        self.args, self.built = args, experiment.build(config)
        task, self.params = self.built.problem.task, self.built.params
        self.loss, self.flat = task.loss, ravel_pytree(self.params)[0]
        self.outputs = lambda params, batch: task.outputs(params, batch)[0]
        self.last = lambda batch: task.outputs(self.params, batch)[1]
        self.train = {name: np.asarray(field) for name, field in self.built.problem.train.items()}
        self.check(args)
        layers = leak.dense_layers(self.params)
        if args.layer >= len(layers):
            raise SystemExit(f"--layer: the model has {len(layers)} dense layers")
        self.layer, self.top = layers[args.layer], layers[-1]
        self.by_inputs = args.layer == 0 and "x" in self.train  # rebuilt inputs can go through the model again
        self.width = trees.paths(self.params)[self.layer.kernel].shape[0]
        self.described = f"layer {self.layer.kernel} with {self.width} inputs, {self.flat.size} parameters in all"
        self.size, self.shown = 0, None
        self.pairs = jax.jit(self._pairs, static_argnums=0)
        self.image = jax.jit(common_basis.make_image(self.outputs, self.loss))
        self.slope = jax.jit(products.make_gradient(self.outputs, self.loss))

    def check(self, args):
        """Refuses what this config's data cannot show, and a picture that could not be saved in the end."""
        total, clients = len(next(iter(self.train.values()))), len(self.built.problem.clients)
        if args.client is None and max(args.examples) > total - OTHERS:
            raise ValueError(f"--examples: the config has {total}, {OTHERS} of them for others, got {args.examples}")
        if args.client is not None and args.client >= clients:
            raise ValueError(f"--client: the config has {clients} clients, from 0 on, got {args.client}")
        if args.picture and not Path(args.picture).absolute().parent.is_dir():
            raise ValueError(f"--picture: there is no folder {Path(args.picture).absolute().parent}")

    def _pairs(self, rank, batch):
        of_client = sketch.make_sketch(self.outputs, self.loss, rank=rank, solver="auto", probes=0, tolerance=1e-9)
        return of_client(jax.random.key(0), self.params, batch)

    def of_client(self, size: int, draw: int) -> dict:
        """{message: (inputs, error, member, labels, exposure)} of one client of `size` examples, 0 for its own."""
        args, random = self.args, np.random.default_rng(draw)
        total = len(next(iter(self.train.values())))
        own = np.asarray(self.built.problem.clients[args.client]) if not size else None
        self.size = len(own) if own is not None else size
        order = random.permutation(np.setdiff1d(np.arange(total), own) if own is not None else total)
        own, rest = (own, order) if own is not None else (order[:size], order[size:])
        others, cohort = rest[:OTHERS], rest[OTHERS : OTHERS + (args.cohort - 1) * self.size]
        batch, outside = ({k: jnp.asarray(v[i]) for k, v in self.train.items()} for i in (own, others))
        truth = leak.layer_inputs(self.outputs, self.params, batch, self.layer)
        self.seen = batch, outside, truth
        update = -np.asarray(self.slope(self.params, batch))
        hidden = update + self.noise(update, random)
        found = {"update alone": self.by_update(update), "update with noise": self.by_update(hidden)}
        for rank in args.ranks:
            pairs = self.pairs(rank, batch)
            values, vectors = np.asarray(pairs.eigenvalues), np.asarray(pairs.basis)
            found[f"eigenpairs, rank {rank}"] = self.by_curvature(values, vectors, update, self.size, rank)
            if self.shown is None or rank == max(args.ranks):
                self.keep(values, vectors)
        rounded = np.asarray(jnp.asarray(vectors, jnp.bfloat16).astype(float))
        found[f"the same in bfloat16 ({rank})"] = self.by_curvature(values, rounded, update, self.size, rank)
        basis = np.linalg.qr(random.normal(size=(self.flat.size, min(args.columns, self.flat.size))))[0]
        one = np.asarray(self.image(self.params, batch, None, jnp.asarray(basis)).values)
        found[f"its own products, s = {args.columns}"] = self.by_sum(one, basis, update, self.size)
        noisy = one + self.noise(one, random)
        found["the same with noise"] = self.by_sum(noisy, basis, hidden, self.size)
        if len(cohort):
            whole = len(cohort) == (args.cohort - 1) * self.size  # else the config has no more
            name = f"sum over {args.cohort} clients" if whole else f"sum over {len(own) + len(cohort)} examples"
            many = {k: jnp.asarray(v[np.concatenate([own, cohort])]) for k, v in self.train.items()}
            everyone = np.asarray(self.image(self.params, many, None, jnp.asarray(basis)).values)
            found[name] = self.by_sum(everyone, basis, update, len(own) + len(cohort))
        return found

    def noise(self, message, random) -> np.ndarray:
        """Noise for a message that was clipped at its own norm: all of it survives."""
        return self.args.noise * np.linalg.norm(message) * random.normal(size=message.shape)

    def by_update(self, update) -> tuple:
        batch, outside, truth = self.seen
        bias = self.layer.bias is not None
        part = leak.blocks(self.layer, self.params, update[:, None].T)[0]
        rebuilt = leak.compared(truth, leak.rebuilt_by_update(part, bias), bias)
        scores = [leak.alignment(self.outputs, self.loss, self.params, one, update) for one in (batch, outside)]
        label, top = self.labels(batch), leak.blocks(self.top, self.params, update[:, None].T)[0]
        right = np.nan if label is None else float(np.mean(label == leak.label_by_update(top)))
        return rebuilt.share, rebuilt.error, leak.area_under_curve(*scores), right, np.nan

    def by_curvature(self, values, vectors, update, examples, columns) -> tuple:
        batch, outside, truth = self.seen
        bias, kept = self.layer.bias is not None, values > 0
        parts = leak.blocks(self.layer, self.params, vectors[:, kept].T)
        candidates = leak.rebuilt_by_curvature(parts, values[kept], bias)
        rebuilt = leak.compared(truth, candidates, bias)
        basis = np.linalg.qr(vectors[:, kept])[0]
        scores = [leak.captured_share(self.outputs, self.params, one, basis) for one in (batch, outside)]
        right = self.right(candidates[rebuilt.nearest], update) if len(candidates) else np.nan
        exposed = leak.exposure(examples, columns, self.width)
        return rebuilt.share, rebuilt.error, leak.area_under_curve(*scores), right, exposed

    def by_sum(self, image, basis, update, examples) -> tuple:
        seen = nystrom(jnp.asarray(image), jnp.asarray(basis))
        values, vectors = np.asarray(seen.values), np.asarray(seen.vectors)
        return self.by_curvature(values, vectors, update, examples, basis.shape[1])

    def labels(self, batch):
        field = batch.get("label", batch.get("y"))
        if field is None or not np.allclose(field, np.round(field)):
            return None
        return np.asarray(field).reshape(len(field), -1)[:, 0].astype(int)

    def right(self, candidates, update) -> float:
        """The share of the labels that the update and the rebuilt inputs give."""
        batch, _, _ = self.seen
        label = self.labels(batch)
        if label is None or not self.by_inputs or not np.all(np.isfinite(candidates)):
            return np.nan
        features = self.last(batch | {"x": jnp.asarray(candidates)})
        phi = np.asarray(features.last if isinstance(features, Features) else features)
        phi = np.concatenate([phi, np.ones_like(phi[:, :1])], axis=1) if self.top.bias is not None else phi
        part = leak.blocks(self.top, self.params, update[:, None].T)[0]
        return float(np.mean(leak.labels_by_both(phi, part) == label))

    def keep(self, values, vectors) -> None:
        """What the picture is to show: the client's inputs and the nearest candidates."""
        truth, bias, kept = self.seen[2], self.layer.bias is not None, values > 0
        parts = leak.blocks(self.layer, self.params, vectors[:, kept].T)
        candidates = leak.rebuilt_by_curvature(parts, values[kept], bias)
        if len(candidates):
            self.shown = truth, candidates[leak.compared(truth, candidates, bias).nearest]

    def draw(self, path: str) -> None:
        """A picture of the first inputs and of what was rebuilt, where they are square images."""
        from matplotlib import pyplot

        image = self.train.get("image")
        side = round((self.width / (image.shape[-1] if image is not None else 1)) ** 0.5)
        channels = self.width // side**2 if side else 0
        if self.shown is None or channels not in (1, 3) or side * side * channels != self.width:
            print(f"no picture: the layer's {self.width} inputs are no square images")
            return
        number = min(len(self.shown[0]), 12)
        figure, axes = pyplot.subplots(2, number, figsize=(number, 2.3), squeeze=False)
        for row, (name, rows) in enumerate(zip(("true", "rebuilt"), self.shown, strict=True)):
            for place in range(number):
                shape = (side, side) if channels == 1 else (side, side, channels)
                low, high = self.shown[0][place].min(), self.shown[0][place].max()
                picture = (rows[place].reshape(shape) - low) / max(high - low, 1e-30)
                axes[row, place].imshow(np.clip(picture, 0, 1), cmap="gray")
                axes[row, place].set(xticks=[], yticks=[], ylabel=name if not place else "")
        figure.tight_layout()
        figure.savefig(path, dpi=100)
        print(f"true and rebuilt images are in {path}")


if __name__ == "__main__":
    main()
