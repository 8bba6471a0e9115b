"""All defaults: every field there is, group by group, and who takes it.

A file in `configs/` starts from `default()` and overrides what differs. The ConfigDict is locked: a field that does
not exist is an error that names the nearest one.
"""

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Every field there is, with its default."""
    config = ConfigDict()  # the run: run.estimate, run.experiment, run.loop, run.phase_parts, run.whole_run
    config.seed = 0  # of initialisation, cohorts, batches and sketches
    config.precision = "float32"  # or "float64"
    config.cohort = 0  # clients a round; 0 for all
    config.chunk = 1  # clients side by side in one vmap; 1 one after another, 0 all, -1 the fastest, as measured once
    config.examples_on = "auto"  # where clients and examples live: device, host, from where a cohort's move; auto: fits
    config.client_store = "auto"  # where what clients keep between rounds lives: device, host; auto: where it fits
    config.rounds_per_call = 1  # above 1, so many rounds run as one compiled program, with their evaluations
    config.stage_seconds = True  # wait for each stage of a round, to time it; False lets the host run ahead
    config.devices = 1  # devices over which the clients of a round are spread; 0 for all, of all processes
    config.compare = ("fipa", "fedavg")  # methods run side by side from the warm-up's end: NAME[:field=value...]
    config.init_from = ""  # a saved model (model.msgpack) to start from instead of a fresh initialisation
    config.init_paths = ""  # regular expression over parameter paths: the others start fresh; "" takes all of init_from
    config.first_round = 0  # number of the first round: a schedule goes on where the saved model's run stopped
    config.writers = ()  # where rows go besides metrics.jsonl: csv, tensorboard, wandb, mlflow
    config.smaller = ""  # what to run where this would take days; said before the first round
    config.checkpoint = checkpoint()
    config.task = task()
    config.data = data()
    config.partition = partition()
    config.model = model()
    config.warmup = phase(rounds=0, aggregator_name="mean")
    config.fipa = phase(rounds=100, aggregator_name="fipa")
    config.eval = evaluation()
    config.personal = personal()
    return config.lock()


def checkpoint() -> ConfigDict:
    """When a run is saved, and how much of it stays: saving.journal and saving.resume."""
    group = ConfigDict()
    group.seconds = 10.0  # between checkpoints: the work that a killed run loses; 0 for each round
    group.keep = 3  # the last so many stay; the warm-up's last and each method's best of them too
    return group


def task() -> ConfigDict:
    """What is learned: tasks.task, then tasks.regression, tasks.pde, tasks.own_data or tasks.text."""
    group = ConfigDict()
    group.name = "sine"
    group.num_clients = 2  # sine: equal intervals of [0, 1]
    group.examples_per_client = 50
    group.seed = 0  # of the examples' positions; own_data: of the sets set apart and the clusters
    group.file = ""  # own_data: .npz of x [N, d] and y [N] or [N, K], maybe x_test, y_test, x_public, client; a table
    group.targets = ()  # own_data: of a table, the columns to predict; () for y
    group.inputs = ()  # own_data: of a table, the columns to predict from; () for all others
    group.client = "client"  # own_data: of a table, the column that says whose a row is, for the split `given`
    group.kind = "auto"  # own_data: regression, classes; auto: words are classes, numbers are not
    group.test_fraction = 0.2  # own_data: of the examples, set apart where the file has no x_test
    group.holdout = 0.0  # own_data: fraction of the other ones set apart, evaluated as `holdout_*`, for tuning
    group.split = "column"  # own_data: column (values or quantiles of one), kmeans (of x), given (the file's client)
    group.column = 0  # own_data: of x, by which the split `column` goes
    group.standardise = "pooled"  # own_data: x to mean 0 and variance 1, by all training examples; client, public, none
    group.window = 32  # text: characters of an example; of the fields above also file, test_fraction, holdout: in time
    group.least_characters = 1000  # text: of a speaker, to be a client
    group.equation = "poisson_1d"  # pde: poisson_1d, _2d, _3d, fisher_kpp, burgers, burgers_mild, helmholtz
    group.boundary_points = 20  # pde: on each face of the domain that a client's strip touches
    group.boundary_weight = 100.0  # pde: lambda, of the squared boundary residuals
    group.test_points = 1024  # pde: about so many, on a grid
    return group


def data() -> ConfigDict:
    """The data set of the task `images`, data.image_sets.find, and how it is trained on: tasks.images."""
    group = ConfigDict()
    group.name = "cifar10"  # of a TFDS data set, or digits, which scikit-learn brings with it
    group.dir = ""  # where TFDS has prepared it; "" for TFDS's own default
    group.cache_dir = ""  # decoded images; "" for the user's cache
    group.train_split = "train"  # or a slice of it, e.g. train[:1000]
    group.test_split = ""  # "" for the data set's own: validation for tiny_imagenet, test for all others
    group.holdout = 0.0  # fraction of the training set apart from it, evaluated as `holdout_*`, for tuning
    group.side = 0  # of the images, averaged down to it: 32 for a 64 is a quarter of the work; 0 leaves them
    group.loss = "cross_entropy"  # or squared: half the squared distance to the label's unit vector
    group.augment = True  # train on random views: rotated, cropped with padding 4, mirrored
    group.rotation = 0.0  # bound on a view's rotation, in degrees; published: 10
    group.flip = True  # mirror half of the views; not for digits
    group.public = ""  # another set, of no client's images, at which a private run may see the model's curvature
    group.public_split = "train[:1000]"  # of it
    return group


def partition() -> ConfigDict:
    """Which client owns which image: data.partition.partition."""
    group = ConfigDict()
    group.name = "dirichlet"  # dirichlet, dirichlet_by_class, shards, iid, file
    group.num_clients = 100
    group.alpha = 0.1
    group.shards_per_client = 2
    group.file = ""  # of a published split: client -> indices in the data set's original order
    group.seed = 0
    return group


def model() -> ConfigDict:
    """The network: models.networks."""
    group = ConfigDict()
    group.name = "mlp"
    group.widths = (16, 16)  # of the mlp's hidden layers
    group.activation = "tanh"
    group.head_width = 0  # of a hidden layer in a ResNet's head; 0 for none
    group.compute_dtype = ""  # of a ResNet's computation, e.g. bfloat16; "" for config.precision
    group.width = 32  # of the transformer
    group.layers = 2  # its blocks
    group.heads = 4  # of attention in each, which divide the width
    group.lora_rank = 0  # of adapters beside the dense layers of its blocks, whose paths contain `lora`; 0 for none
    return group


def evaluation() -> ConfigDict:
    """When figures are taken: run.loop; and of how many examples at a time: reporting.metrics.make_evaluate."""
    group = ConfigDict()
    group.every = 1  # rounds between evaluations on the test set; the last round of a phase always is
    group.clients_every = 1  # rounds between evaluations on every client's own examples; 0 for never
    group.samples = 8  # models drawn where the server has a belief (posterior): `test_belief_*`, of mean probabilities
    group.batch_size = 50  # small batches stay in a CPU's cache; raise it on an accelerator
    return group


def personal() -> ConfigDict:
    """Models that clients have for themselves once a method is trained: run.personal_stage, run.personal_ways."""
    group = ConfigDict()
    group.compare = ()  # ways to get them, side by side: global, local, finetune, ditto, curvature, laplace, spread
    group.newcomers = 0.0  # share of the clients that no round sees, and that alone get models; 0: all clients do
    group.examples = (0,)  # own training examples that a model is made of, one number after another; 0 for all
    group.folds = 5  # of these, by which strength or steps are chosen, one for all clients together
    group.strengths = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # tried by all but finetune
    group.steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # that finetune tries: with momentum, on all own examples
    group.lr = 0.01  # of these steps
    group.own = ""  # regular expression over the paths of parameters that every client has for itself, free of priors
    group.damping = 0.1  # of curvature and laplace, in units of the curvature's mean eigenvalue
    group.fit_steps = 20  # of Gauss-Newton, by which all but finetune find their models; a linear model needs 1
    return group


def phase(rounds: int, aggregator_name: str) -> ConfigDict:
    """One phase: who learns what, how, and how uploads become a step."""
    group = ConfigDict()  # run.experiment, run.loop, run.phase_parts, run.whole_run
    group.rounds = rounds
    group.trainable = ".*"  # regular expression over parameter paths, e.g. "^head/" for one layer
    group.also_trained = (
        ""  # the same of what clients train, where that is more: only the change of `trainable` is sent
    )
    group.pooled = False  # one client holds all examples: the ceiling that a federated run is measured against
    group.cache_body = False  # where only the head is trained: run it on features that are computed once
    group.cache_views = 0  # random views of each example whose features are kept, to train on; 0 for the plain one
    group.least_clients = 1  # a round in which fewer are left of its clients is skipped
    group.most_bytes_up = 0.0  # that a phase's clients may send: it ends where another round might be too much; 0: any
    group.max_skips = 10  # so many skipped rounds in a row end the run; 0 for never
    group.local = local()
    group.term = term()
    group.sketch = sketch()
    group.aggregator = aggregator(aggregator_name)
    group.server = server()
    group.late = late()
    group.faults = faults()
    group.privacy = privacy()
    return group


def local() -> ConfigDict:
    """A client's training: the solver that `optimizer` names, and client.local_solver.Hyper for what is traced."""
    return ConfigDict(
        {
            # client.first_order.first_order, client.second_order.gauss_newton, client.second_order.lbfgs,
            # client.second_order.natural_gradient, client.first_order.gradient, client.ivon.ivon
            # sgd, momentum, nesterov, adam, yogi, gauss_newton, lbfgs, natural_gradient, kronecker, gradient, ivon
            "optimizer": "sgd",
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
            "damping": 1e-4,  # of the gauss_newton, natural_gradient or kronecker step
            "matched": False,  # of these: under FIPA their damping is the server's, the step untested
            "compress": {  # client.compression.Compression
                # of the update: none, few_bits (QSGD; FedPAQ), change (with the term varp), top_k (with feedback)
                "name": "none",
                "bits": 8,  # of an entry, for few_bits (2 to 16) and change (1 to 8)
                "share": 0.01,  # of the entries, for top_k
            },
            "adaptive": {  # client.local_solver.adaptive_steps
                "scale": 0.0,  # c of the published rule for the steps, by the sketch; 0 for none; published: 0.01
                "max_steps": 200,  # that this rule may ask for
            },
            "gauss_newton": {  # client.second_order.gauss_newton
                "tries": 10,  # dampings that a step tries, tenfold each; 0 takes the first one's untested
                "system": "auto",  # gram, cg (matrix-free); auto: gram up to 2000 equations
                "cg_steps": 100,  # products with the curvature that cg may take for one step
            },
        }
    )


def term() -> ConfigDict:
    """What is added to a client's objective: client.terms.TERMS, and `mu` in client.local_solver.Hyper."""
    group = ConfigDict()
    # none, feedback (what local.compress leaves out), duals (IVON)
    # prox, scaffold, dyn, moon, rcl (FedRCL; published mu 1), logit_adjustment (mu 1), mifa, varp
    group.name = "none"
    group.mu = 0.01  # the weight of those that have one
    return group


def sketch() -> ConfigDict:
    """A client's curvature: curvature.sketch.make_sketch or curvature.sketch.make_diagonal; from sums
    curvature.common_basis.make_image, within a span curvature.common_basis.make_core; layer by layer
    curvature.layer_factors.make_layer_factors."""
    group = ConfigDict()
    group.solver = "subspace"  # auto, subspace (the paper's), lanczos, rows (exact), head (the last layer)
    group.rank = 20
    group.oversample = 10
    group.power_steps = 2
    group.tolerance = 1e-3  # of the residuals |H u - lam u| / lam_max, at which lanczos stops
    group.micro_batch = 0  # examples at a time, about 5 for rows on a CPU; 0 for all
    group.jacobian = "matrix_free"  # or "rows": explicit, faster for convolutions with few classes
    group.loss_rank = 0  # eigendirections of each example's loss Hessian that rows take; 0 for all
    group.probes = 4  # for the estimate of the curvature that the rank misses
    group.energy = 0.0  # keep only the pairs that reach this share of the trace; 0 for all
    group.gradient_scale = 0.0  # c of the published rank rule, by the gradients' norms; 0 for none
    group.store = ""  # dtype of the basis as it is sent: bfloat16 halves it; "" for the parameters' own
    group.bits = 0  # of an entry of the basis, or core, as it is sent, rounded at random: 2 to 16; 0 for `store`
    group.examples = 0  # of a client that enter its sketch; 0 for all
    group.share = 1.0  # of a cohort that sends one, in the mean over the rounds: curvature.sketchers.sent_seldom
    group.budget = 0.0  # bytes of curvature, a mean of clients and rounds, for the largest pairs; 0: all are sent
    group.link = 0.0  # Mbit/s of a client's uplink: only the pairs are sent that arrive before `deadline`; 0: all are
    group.deadline = 0.0  # seconds for all that a client sends in a round; nothing else of it is left out
    group.full = 1  # first rounds of the phase in which all do even so
    group.views = False  # of random views of the examples, where config.data.augment is set
    group.sharing = "expand"  # kronecker: how the positions count at which a layer's weights are used: expand, reduce
    group.samples = 0  # kronecker: of the outputs' directions that enter a layer's second factor; 0 for all
    group.common_start = False  # iterative solvers begin from one basis for all clients of a round
    return group


def aggregator(name: str) -> ConfigDict:
    """How uploads become one step: the rule of aggregate.rules.AGGREGATORS that `name` names."""
    return ConfigDict(
        {
            # aggregate.rules.mean, aggregate.fisher_informed.fipa, aggregate.rules.diagonal, aggregate.robust.krum,
            # aggregate.robust.trimmed_mean, aggregate.sum_rule.from_sums, aggregate.layerwise.kronecker,
            # aggregate.posteriors.posterior, aggregate.gradient_span.from_span
            # mean, fipa, diagonal, kronecker, sums, span, posterior, and the robust ones: median, trimmed_mean, krum,
            # multi_krum, geometric_median
            "name": name,
            "weighting": "examples",  # or "uniform"
            "form": "damped",  # pinv, tikhonov, damped
            "damping": 1e-3,
            "relative": True,  # damping in units of the largest eigenvalue of H
            "rcond": 1e-5,  # pinv's cut-off
            "trust": False,  # damping follows the clients' losses, and a step that raised them is undone
            "own_damping": False,  # updates count as the clients' own damped steps, 1 / (lr steps); see aggregate
            "merge": "auto",  # of the sketches: auto, qr, tsqr, gram
            "at": "local",  # where diagonal and kronecker see the curvature: local or broadcast parameters
            "faulty": 0.2,  # trimmed_mean, krum, multi_krum: the share of the clients that may be at fault
            "past": {  # aggregate.past_rounds.PastRounds
                "kind": "none",  # of past rounds': none, prior, targets, latest; curvature: of clients' gradients
                "decay": 0.9,  # by which the weight of what is remembered falls with each round
                "rank": 250,  # R' of a message: R' P numbers for each of 1, `length` or all clients
                "length": 8,  # cohorts that `targets` remembers
                "adaptive": False,  # damping follows how the steps of successive cohorts agree; see adaptive_damping
            },
            "layers": {  # aggregate.layerwise.LayerOptions
                "kind": "foof",  # of kronecker: foof (FedPM), kfac (FedFisher-KFAC, FedLPA), regmean
                "iterations": 50,  # kfac: of conjugate gradients for a layer, at most
                "shrink": 0.9,  # regmean: factor of what is off the diagonal
            },
            "posterior": {  # aggregate.posteriors.PosteriorOptions
                "form": "sum",  # sum (FedIvon) or admm (IVON-ADMM, with the term duals)
                "prior": 1e-3,  # precision of the prior about 0, per example
                "start": 0.1,  # the server's curvature before the first round, per example
                "rho": 1.0,  # of admm's duals
            },
            "sums": _sums(),
            "span": _span(),
            "limits": {  # aggregate.limits.Limits
                "max_step": 5.0,  # bound on |step| / max |delta|; 0 for none
                "max_divergence": 0.0,  # bound on step^T H step / 2, the move of the model's answers; 0 for none
                "explosion": 100.0,  # the ratio above which the damped form, or the mean, is taken instead; 0 for none
                "trace_cap": 1000.0,  # bound on a client's eigenvalues' sum over the clients' median; 0 for none
            },
            "late": {  # aggregate.late_updates.LateUpdates
                "staleness": 0.5,  # s, of late clients: their weight is (1 + age)^-s of another's
                "transport": True,  # a late client's target stays where it was, seen from the present parameters
                "max_drift": 0.0,  # bound on how far a late client's answers have moved since it began; 0 for none
                "mix": False,  # mean: a late client's model is mixed in (FedAsync), not its update added (FedBuff)
            },
        }
    )


def _sums() -> ConfigDict:
    """What a server that sees sums alone asks about: aggregate.sums.SumOptions."""
    return ConfigDict(
        {
            "form": "galerkin",  # galerkin (any local training), gradient (clients send gradients)
            "columns": 50,  # s, of the basis that all clients multiply; at most
            "fresh": 5,  # of them drawn anew in each round
            "basis": "last",  # where the others come from: last (the last sum), seed (all are drawn)
            "tail": 0.0,  # columns come and go so that the least eigenvalue is so large a part of beta; 0: all
            "bits": 0,  # of a sum in fixed point, 8 to 32; 0 for floating point
            "seed": 0,  # of the columns that are drawn
        }
    )


def _span() -> ConfigDict:
    """What clients are asked about in the span of gradients: aggregate.gradient_span.SpanOptions."""
    return ConfigDict(
        {
            "columns": 100,  # s, directions about which clients are asked; at most
            "fresh": 5,  # of them from the last round's gradients
            "decay": 0.99,  # by which answers count for less with each round
            "prior": 0.3,  # by how many cohorts' answers the guess of a new direction's curvature counts; 0 for none
            "bits": 8,  # of an entry of the basis as it is sent, 2 to 16; 0 for floating point
            "seed": 0,  # of its rounding
        }
    )


def server() -> ConfigDict:
    """How the server goes along the step: aggregate.server_optimizers.make, and `lr` in federation.parts.Rates."""
    group = ConfigDict()
    # sgd, momentum (FedAvgM), adam (FedAdam), yogi (FedYogi), adagrad (FedAdagrad), acg (FedACG, with the term prox),
    # exp (FedExP), eve (FedEve)
    group.optimizer = "sgd"
    group.momentum = 0.9
    group.lr = 1.0
    group.average = 0.0  # decay of the mean of past models that a phase leaves in place of the last one; 0 for none
    return group


def late() -> ConfigDict:
    """Which clients of a round began before it, on what the parameters were then: federation.channel.late."""
    group = ConfigDict()
    group.share = 0.0  # so large a part of a round's clients
    group.most = 10  # up to so many rounds before
    return group


def faults() -> ConfigDict:
    """Faults injected for studies, each with the probability that an upload has it: federation.channel.FaultRates."""
    group = ConfigDict()
    group.drop = 0.0  # it never arrives
    group.straggle = 0.0  # the client has done only a random part of its local steps
    group.nan = 0.0  # its update is NaN
    group.flip = 0.0  # its update comes with the opposite sign
    group.scale = 0.0  # its eigenvalues come multiplied by `scale_by`
    group.scale_by = 1e6
    return group


def privacy() -> ConfigDict:
    """Differential privacy of a client's whole data: run.private_run, which hands on to privacy.noisy_sum.private."""
    group = ConfigDict()
    group.epsilon = 0.0  # that all rounds of the phase may spend together, at `delta`; 0 for no privacy
    group.delta = 1e-3  # well below one over the number of clients
    group.clip = 0.1  # C, bound on the norm of a client's update
    group.clip_decay = 1.0  # factor on it after each round: below 1 the noise falls with the steps
    group.noise_multiplier = 0.0  # z; 0 for the least with which all rounds stay within epsilon
    group.sampling = "all"  # or poisson: each client takes part with the probability cohort / clients
    group.whitening = "none"  # public (by the curvature at public examples), release (by private features, once)
    group.damping = 0.1  # beta of the whitening (H / beta + I)^(-1/2)
    group.eigenpairs = 50  # of the public examples' curvature, at most
    group.release_share = 0.2  # of the budget, for the released features, as if all took part in all rounds
    return group
