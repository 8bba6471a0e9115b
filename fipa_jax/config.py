"""All defaults, and what is checked about a config before anything is computed.

A file in `configs/` starts from `default()` and overrides what differs. The ConfigDict is locked: a field that does
not exist is an error that names the nearest one.
"""

import hashlib
import os
import platform
import re
from pathlib import Path

from ml_collections import ConfigDict

from fipa_jax import fields
from fipa_jax.compared import rule


def default() -> ConfigDict:
    """Every field there is, with its default."""
    config = ConfigDict()
    config.seed = 0  # of initialisation, cohorts, batches and sketches
    config.precision = "float32"  # or "float64"
    config.cohort = 0  # clients a round; 0 for all
    config.chunk = 1  # clients side by side in one vmap; 1 one after another, 0 all, -1 the fastest, as measured once
    config.examples_on = "auto"  # where clients and examples live: device, host, from where a cohort's move; auto: fits
    config.client_memory = "auto"  # where what clients keep between rounds lives: device, host; auto: where it fits
    config.rounds_per_call = 1  # above 1, so many rounds run as one compiled program, with their evaluations
    config.stage_seconds = True  # wait for each stage of a round, to time it; False lets the host run ahead
    config.devices = 1  # devices over which the clients of a round are spread; 0 for all, of all processes
    config.compare = ("fipa", "fedavg")  # rules run side by side from the warm-up's end: NAME[:field=value...]
    config.init_from = ""  # a saved model (model.msgpack) to start from instead of a fresh initialisation
    config.first_round = 0  # number of the first round: a schedule goes on where the saved model's run stopped

    config.checkpoint = ConfigDict()
    config.checkpoint.seconds = 10.0  # between checkpoints: the work that a killed run loses; 0 for each round
    config.checkpoint.keep = 3  # the last so many stay; the warm-up's last and each rule's best of them too

    config.task = ConfigDict()
    config.task.name = "sine"
    config.task.num_clients = 2  # sine: equal intervals of [0, 1]
    config.task.examples_per_client = 50
    config.task.seed = 0  # of the examples' positions; npz: of the test set and the clusters
    config.task.file = ""  # npz: with x [N, d] and y [N] or [N, K]; x_test, y_test and client [N] may be there too
    config.task.test_fraction = 0.2  # npz: of the examples, set apart where the file has no x_test
    config.task.split = "column"  # npz: column (values or quantiles of one), kmeans (of x), given (the file's client)
    config.task.column = 0  # npz: of x, by which the split `column` goes
    config.task.standardise = True  # npz: x and y to mean 0 and variance 1, by the training set's moments
    config.task.equation = "poisson_1d"  # pde: poisson_1d, _2d, _3d, fisher_kpp, burgers, burgers_mild, helmholtz
    config.task.boundary_points = 20  # pde: on each face of the domain that a client's strip touches
    config.task.boundary_weight = 100.0  # pde: lambda, of the squared boundary residuals
    config.task.test_points = 1024  # pde: about so many, on a grid

    config.data = ConfigDict()
    config.data.name = "cifar10"  # of a TFDS data set
    config.data.dir = ""  # where TFDS has prepared it; "" for TFDS's own default
    config.data.cache_dir = ""  # decoded images; "" for the user's cache
    config.data.train_split = "train"  # or a slice of it, e.g. train[:1000]
    config.data.test_split = ""  # "" for the data set's own: validation for tiny_imagenet, test for all others
    config.data.holdout = 0.0  # fraction of the training set apart from it, evaluated as `holdout_*`, for tuning
    config.data.side = 0  # of the images, averaged down to it: 32 for a 64 is a quarter of the work; 0 leaves them
    config.data.augment = True  # train on random views: rotated, cropped with padding 4, mirrored
    config.data.rotation = 0.0  # bound on a view's rotation, in degrees; published: 10
    config.data.flip = True  # mirror half of the views; not for digits

    config.partition = ConfigDict()
    config.partition.name = "dirichlet"  # dirichlet, dirichlet_by_class, shards, iid, file
    config.partition.num_clients = 100
    config.partition.alpha = 0.1
    config.partition.shards_per_client = 2
    config.partition.file = ""  # of a published split: client -> indices in the data set's original order
    config.partition.seed = 0

    config.model = ConfigDict()
    config.model.name = "mlp"
    config.model.widths = (16, 16)  # of the mlp's hidden layers
    config.model.activation = "tanh"
    config.model.head_width = 0  # of a hidden layer in a ResNet's head; 0 for none
    config.model.compute_dtype = ""  # of a ResNet's computation, e.g. bfloat16; "" for config.precision

    config.warmup = phase(rounds=0, aggregator="mean")
    config.fipa = phase(rounds=100, aggregator="fipa")

    config.eval = ConfigDict()
    config.eval.every = 1  # rounds between evaluations on the test set; the last round of a phase always is
    config.eval.clients_every = 1  # rounds between evaluations on every client's own examples; 0 for never
    config.eval.batch_size = 50  # small batches stay in a CPU's cache; raise it on an accelerator
    return config.lock()


def phase(rounds: int, aggregator: str) -> ConfigDict:
    """One phase's fields: who learns what, how, and how uploads become a step."""
    return ConfigDict(
        {
            "rounds": rounds,
            "trainable": ".*",  # regular expression over parameter paths, e.g. "^head/" for one layer
            "pooled": False,  # one client holds all examples: the ceiling that a federated run is measured against
            "cache_body": False,  # where only the head is trained: run it on features that are computed once
            "cache_views": 0,  # random views of each example whose features are kept, to train on; 0 for the plain one
            "local": {
                "optimizer": "sgd",  # sgd, momentum, nesterov, adam, yogi, gauss_newton, lbfgs, natural_gradient
                "lr": 0.1,
                "lr_decay": 1.0,  # the learning rate of round k is lr * lr_decay^k, counted over both phases
                "momentum": 0.9,
                "weight_decay": 0.0,
                "clip_norm": 0.0,  # bound on the gradient's norm; 0 for none
                "batch_size": 50,  # 0 for all of the client's examples
                "views": True,  # on random views of the examples, where config.data.augment is set
                "micro_batch": 0,  # examples whose gradients are computed at a time; 0 for all, -1 as suits the backend
                "epochs": 5,
                "steps": 0,  # instead of epochs, where positive
                "step_scale": 0.0,  # c of the published rule for the steps, by the sketch; 0 for none; published: 0.01
                "max_steps": 200,  # that this rule may ask for
                "damping": 1e-4,  # of the gauss_newton or natural_gradient step
                "matched": False,  # of these two: under FIPA their damping is the server's, the step untested
                "tries": 10,  # dampings that a gauss_newton step tries, tenfold each; 0 takes the first one's untested
                "system": "auto",  # of the gauss_newton step: gram, cg (matrix-free); auto: gram up to 2000 equations
                "cg_steps": 100,  # products with the curvature that cg may take for one step
            },
            # none, prox, scaffold, dyn, moon, rcl (FedRCL; published mu 1), logit_adjustment (mu 1), mifa, varp; mu is
            # the weight of those that have one
            "term": {"name": "none", "mu": 0.01},
            "sketch": {
                "solver": "subspace",  # auto, subspace (the paper's), lanczos, rows (exact), head (the last layer)
                "rank": 20,
                "oversample": 10,
                "power_steps": 2,
                "tolerance": 1e-3,  # of the residuals |H u - lam u| / lam_max, at which lanczos stops
                "micro_batch": 0,  # examples at a time, about 5 for rows on a CPU; 0 for all
                "jacobian": "matrix_free",  # or "rows": explicit, faster for convolutions with few classes
                "loss_rank": 0,  # eigendirections of each example's loss Hessian that rows take; 0 for all
                "probes": 4,  # for the estimate of the curvature that the rank misses
                "energy": 0.0,  # keep only the pairs that reach this share of the trace; 0 for all
                "gradient_scale": 0.0,  # c of the published rank rule, by the gradients' norms; 0 for none
                "store": "",  # dtype of the basis as it is sent: bfloat16 halves it; "" for the parameters' own
                "memory": 2.0,  # GiB that explicit rows may take, for auto
                "examples": 0,  # of a client that enter its sketch; 0 for all
            },
            "aggregator": {
                "name": aggregator,
                "weighting": "examples",  # or "uniform"
                "form": "damped",  # pinv, tikhonov, damped
                "damping": 1e-3,
                "relative": True,  # damping in units of the largest eigenvalue of H
                "rcond": 1e-5,  # pinv's cut-off
                "trust": False,  # damping follows the clients' losses, and a step that raised them is undone
                "memory": "none",  # of past rounds' curvature: none, prior, targets, latest; for few clients of many
                "memory_decay": 0.9,  # by which the weight of what is remembered falls with each round
                "memory_rank": 250,  # R' of a message: R' P numbers for each of 1, memory_length or all clients
                "memory_length": 8,  # cohorts that `targets` remembers
                "staleness": 0.5,  # s, of late clients: their weight is (1 + age)^-s of another's
                "transport": True,  # a late client's target stays where it was, seen from the present parameters
                "max_drift": 0.0,  # bound on how far a late client's answers have moved since it began; 0 for none
                "mix": False,  # mean: a late client's model is mixed in (FedAsync), not its update added (FedBuff)
                "own_damping": False,  # updates count as the clients' own damped steps, 1 / (lr steps); see aggregate
                "max_step": 5.0,  # bound on |step| / max |delta|; 0 for none
                "max_divergence": 0.0,  # bound on step^T H step / 2, the move of the model's answers; 0 for none
                "explosion": 100.0,  # the ratio above which the damped form, or the mean, is taken instead; 0 for none
                "trace_cap": 1000.0,  # bound on a client's eigenvalues' sum over the clients' lower median; 0 for none
                "merge": "auto",  # of the sketches: auto, qr, tsqr, gram
                "at": "local",  # where the diagonal rule sees the curvature: local or broadcast parameters
            },
            # sgd, momentum (FedAvgM), adam (FedAdam), yogi (FedYogi), acg (FedACG, with the term prox), exp (FedExP)
            "server": {"optimizer": "sgd", "momentum": 0.9, "lr": 1.0},
            "least_clients": 1,  # a round in which fewer are left of its clients is skipped
            "max_skips": 10,  # so many skipped rounds in a row end the run; 0 for never
            # Of a round's clients so large a share began up to `most` rounds before, on what the parameters were then.
            "late": {"share": 0.0, "most": 10},
            # Injected for studies: the probability that an upload has the fault.
            "faults": {
                "drop": 0.0,  # it never arrives
                "straggle": 0.0,  # the client has done only a random part of its local steps
                "nan": 0.0,  # its update is NaN
                "flip": 0.0,  # its update comes with the opposite sign
                "scale": 0.0,  # its eigenvalues come multiplied by `scale_by`
                "scale_by": 1e6,
            },
        }
    )


def validate(config: ConfigDict) -> None:
    """Checks what can be checked without data.

    Raises:
      ValueError: names the field, what was needed and what arrived.
    """
    fields.check(config, default())
    _one_of("precision", config.precision, ("float32", "float64"))
    for field in ("examples_on", "client_memory"):
        _one_of(field, config[field], ("auto", "device", "host"))
    _at_least("seed", config.seed, 0)
    _at_least("cohort", config.cohort, 0)
    _at_least("chunk", config.chunk, -1)
    _at_least("rounds_per_call", config.rounds_per_call, 1)
    _at_least("devices", config.devices, 0)
    _at_least("first_round", config.first_round, 0)
    _at_least("checkpoint.seconds", config.checkpoint.seconds, 0)
    _at_least("checkpoint.keep", config.checkpoint.keep, 1)
    _at_least("eval.every", config.eval.every, 1)
    _at_least("eval.clients_every", config.eval.clients_every, 0)
    _at_least("eval.batch_size", config.eval.batch_size, 1)
    _at_least("task.num_clients", config.task.num_clients, 1)
    _at_least("task.examples_per_client", config.task.examples_per_client, 1)
    for field in ("boundary_points", "boundary_weight"):
        _at_least(f"task.{field}", config.task[field], 0)
    _at_least("task.test_points", config.task.test_points, 1)
    if not 0 < config.task.test_fraction < 1:
        raise ValueError(f"config.task.test_fraction: needs a fraction in (0, 1), got {config.task.test_fraction}")
    _at_least("task.column", config.task.column, 0)
    _at_least("task.seed", config.task.seed, 0)
    _at_least("partition.seed", config.partition.seed, 0)
    _at_least("partition.num_clients", config.partition.num_clients, 1)
    _at_least("model.widths", min(config.model.widths, default=1), 1)
    _at_least("model.head_width", config.model.head_width, 0)
    _one_of("model.compute_dtype", config.model.compute_dtype, ("", "bfloat16", "float16", "float32", "float64"))
    if not 0 <= config.data.holdout < 1:
        raise ValueError(f"config.data.holdout: needs a fraction in [0, 1), got {config.data.holdout}")
    _at_least("data.side", config.data.side, 0)
    if not 0 <= config.data.rotation <= 180:
        raise ValueError(f"config.data.rotation: needs degrees in [0, 180], got {config.data.rotation}")
    is_mnist = config.task.name == "images" and config.data.name.partition(":")[0] == "mnist"
    if is_mnist and config.data.augment and config.data.flip:
        raise ValueError("config.data.flip: a mirrored digit is no digit; with the data set 'mnist' set it to False")
    if config.task.name == "images" and config.cohort > config.partition.num_clients:
        raise ValueError(
            f"config.cohort: {config.cohort} is above the number of clients, {config.partition.num_clients}"
        )
    if not config.compare:
        raise ValueError(f"config.compare: needs a tuple of rules such as ('fipa', 'fedavg'), got {config.compare!r}")
    if len(set(config.compare)) != len(config.compare):
        raise ValueError(f"config.compare: names a rule twice: {config.compare}")
    _at_least("fipa.rounds", config.fipa.rounds, 0)
    _validate_phase("warmup", config.warmup, least_rounds=0)
    for spec in config.compare:
        settings = rule(config, spec)
        try:
            fields.check(settings, config.fipa, "config.fipa")
            _validate_phase("fipa", settings, least_rounds=min(config.fipa.rounds, 1))
        except ValueError as error:
            raise ValueError(f"{error} (in the rule {spec!r})") from None
    if config.warmup.rounds + config.fipa.rounds < 1:
        raise ValueError("config.warmup.rounds and config.fipa.rounds are both 0: nothing to run")


def prepare_process(devices: int = 1) -> None:
    """Sets what must stand in the environment before jax starts; call it first in a script.

    Batched LAPACK calls can deadlock XLA's CPU thread pool on machines with few cores unless its concurrent scheduler
    is off, and OpenBLAS's own threads slow small factorisations up to a hundred times. Compiled programs are kept in
    the user's cache, also those that took no time to compile: a run has dozens of them. Values the user has set win.
    """
    # A program compiled for one kind of CPU may not run on another that shares the home folder.
    programs = user_cache() / f"programs-{platform.machine()}-{hashlib.sha256(_cpu_features()).hexdigest()[:8]}"
    defaults = {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
    if devices > 1:
        wanted.append(f"--xla_force_host_platform_device_count={devices}")
    missing = [flag for flag in wanted if flag.split("=")[0] not in flags]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()


def user_cache() -> Path:
    """The folder in which what can be made anew is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fipa_jax"


def _cpu_features() -> bytes:
    """What tells kinds of CPU apart: Linux lists a processor's abilities; elsewhere its name must do."""
    try:
        found = Path("/proc/cpuinfo").read_bytes()
    except OSError:
        return platform.processor().encode()
    lines = [line for line in found.splitlines() if line.lower().startswith((b"flags", b"features"))]
    return lines[0] if lines else b""


def _validate_phase(name, settings, least_rounds):
    _at_least(f"{name}.rounds", settings.rounds, least_rounds)
    try:
        re.compile(settings.trainable)
    except re.error as error:
        found = f"got {settings.trainable!r} ({error})"
        raise ValueError(f"config.{name}.trainable: needs a regular expression, {found}") from None
    _at_least(f"{name}.cache_views", settings.cache_views, 0)
    for group in ("local", "server"):
        if not 0 <= settings[group].momentum < 1:
            raise ValueError(
                f"config.{name}.{group}.momentum: needs a number in [0, 1), got {settings[group].momentum}"
            )
    for field in ("lr", "lr_decay", "weight_decay", "clip_norm", "batch_size", "steps", "damping"):
        _at_least(f"{name}.local.{field}", settings.local[field], 0)
    _at_least(f"{name}.local.micro_batch", settings.local.micro_batch, -1)
    for field in ("tries", "step_scale"):
        _at_least(f"{name}.local.{field}", settings.local[field], 0)
    _at_least(f"{name}.local.max_steps", settings.local.max_steps, 1)
    _at_least(f"{name}.local.cg_steps", settings.local.cg_steps, 1)
    if not settings.local.steps:
        _at_least(f"{name}.local.epochs", settings.local.epochs, 1)
    _at_least(f"{name}.term.mu", settings.term.mu, 0)
    if settings.term.name == "dyn" and not settings.term.mu:
        raise ValueError(f"config.{name}.term.mu: the term dyn divides by it and needs more than 0, got 0")
    _at_least(f"{name}.sketch.rank", settings.sketch.rank, 1)
    for field in ("oversample", "power_steps", "tolerance", "micro_batch", "loss_rank", "probes", "gradient_scale"):
        _at_least(f"{name}.sketch.{field}", settings.sketch[field], 0)
    for field in ("memory", "examples"):
        _at_least(f"{name}.sketch.{field}", settings.sketch[field], 0)
    if not 0 <= settings.sketch.energy <= 1:
        raise ValueError(f"config.{name}.sketch.energy: needs a share in [0, 1], got {settings.sketch.energy}")
    for field in ("damping", "rcond", "max_step", "max_divergence", "max_drift", "staleness", "explosion", "trace_cap"):
        _at_least(f"{name}.aggregator.{field}", settings.aggregator[field], 0)
    if not 0 <= settings.aggregator.memory_decay <= 1:
        raise ValueError(
            f"config.{name}.aggregator.memory_decay: needs a number in [0, 1], got {settings.aggregator.memory_decay}"
        )
    for field in ("memory_rank", "memory_length"):
        _at_least(f"{name}.aggregator.{field}", settings.aggregator[field], 1)
    _at_least(f"{name}.server.lr", settings.server.lr, 0)
    for field in ("least_clients", "max_skips"):
        _at_least(f"{name}.{field}", settings[field], 0)
    if not 0 <= settings.late.share <= 1:
        raise ValueError(f"config.{name}.late.share: needs a probability in [0, 1], got {settings.late.share}")
    _at_least(f"{name}.late.most", settings.late.most, 1)
    for field, value in settings.faults.items():
        _at_least(f"{name}.faults.{field}", value, 0)
        if value > 1 and field != "scale_by":
            raise ValueError(f"config.{name}.faults.{field}: needs a probability in [0, 1], got {value}")


def _at_least(field, value, least):
    if not value >= least:  # NaN is not
        raise ValueError(f"config.{field}: needs at least {least}, got {value}")


def _one_of(field, value, known):
    if value not in known:
        raise ValueError(f"config.{field}: unknown {value!r}; known: {', '.join(filter(None, known))}")
