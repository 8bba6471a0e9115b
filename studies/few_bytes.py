"""At equal bytes up: is FIPA ahead of compressed first-order rules, and what does each way to save bytes cost?

FIPA sends gradients in 12 bits and few eigenpairs in 8 or 4 (`fipa_few_bytes`), or no eigenpair: gradients in 8 bits
and the curvature within the span of past gradients (`fipa_span`). Averaging and FedAdam send updates in 8 bits (QSGD,
FedPAQ) or a tenth of the entries (top-k with error feedback), FedVARP 8 or all bits. Every rule takes as many
rounds as the bytes allow: on digits what 40 rounds of FIPA with a budget send, on CIFAR-10 what 50 rounds of plain
FedAvg send. Each has six settings on digits and four on CIFAR-10, chosen on the held-out images of seeds 9 to 11, on
CIFAR-10 of seed 9 at alpha 0.1, after as many bytes. Where they lie was seen before: FIPA's few pairs and bits on seed
8, the others by a first grid whose edges were chosen. In the span nothing is chosen: it has no damping to tune, and is
as its name says on every task; a last row has half as many directions in 3 bits, for the sake of the bytes down. At
alpha 0.1 it goes on to four times the bytes, beside the best first-order rule.

The ablations take one piece away at a time: of `fipa_few_bytes` at a damping of 0.01, of `fipa_span` as it is.
"""

from evidence.records import (
    SENT,
    Run,
    Spread,
    Study,
    Table,
    after_bytes,
    chosen,
    draw_lines,
    every,
    fewer_images,
    own_fields,
    sent,
    usual_row,
)

EIGHT, TWELVE = "local.compress.name=few_bits", "local.compress.name=few_bits:local.compress.bits=12"
TOP = "term.name=feedback:local.compress.name=top_k:local.compress.share=0.1"
BUDGET = "sketch.rank=20:sketch.budget=6700"
ADAM = "FedAdam in 8 bits"
RULES = {  # label -> method; the numbers of its own follow
    "FIPA at few bytes": "fipa_few_bytes:{2}:" + TWELVE + ":aggregator.damping={0}:server.lr={1}",
    "FedAvg in 8 bits": "fedavg:" + EIGHT + ":local.lr={}:server.lr={}",
    ADAM: "fedavg:server.optimizer=adam:" + EIGHT + ":local.lr={}:server.lr={}",
    "FedAvg, a tenth of the entries": "fedavg:" + TOP + ":local.lr={}:server.lr={}",
    "FedVARP in float32": "fedavg:term.name=varp:local.lr={}:server.lr={}",
    "FedAvg in float32": "fedavg:local.lr={}:server.lr={}",
    "FedVARP in 8 bits": "fedavg:term.name=varp:" + EIGHT + ":local.lr={}:server.lr={}",
}
ROUNDS = {"digits": (40, 270, 270, 340, 68, 68, 270), "cifar10": (56, 200, 200, 250, 50, 50, 200)}
BYTES = {"digits": 1.38e6, "cifar10": 23.71e6}  # that all clients may send
SPAN, FEW_DOWN = "FIPA in the span of gradients", "FIPA in the span, 50 directions in 3 bits"
FEW = "aggregator.span.columns=50:aggregator.span.bits=3:"
LONG, FOUR_TIMES = "CIFAR-10, alpha 0.1, four times the bytes", 4 * 23.71e6
CHEAP = "sketch.loss_rank=1:aggregator.past.rank=100"  # one direction of each loss's Hessian, fewer past pairs
TWO, THREE = f"{CHEAP}:sketch.rank=2", f"{CHEAP}:sketch.rank=3:sketch.bits=4:rounds=65"
GRIDS = {  # of the two numbers, and of FIPA's pairs: equally many settings of each rule
    "digits": (
        [(beta, step, BUDGET) for beta in (0.03, 0.01, 0.003) for step in (0.1, 0.05)],
        [(0.3, 1), (0.1, 1), (0.03, 1), (0.3, 0.3), (0.1, 0.3), (0.1, 0.1)],
        [(rate, step) for rate in (0.3, 0.1) for step in (0.01, 0.003, 0.001)],
    ),
    "cifar10": (
        [(0.1, 0.1, TWO), (0.03, 0.05, TWO), (0.1, 0.1, THREE), (0.1, 0.05, THREE)],
        [(0.1, 0.32), (0.1, 0.16), (0.1, 0.08), (0.03, 0.3)],
        [(0.1, 0.003), (0.1, 0.001), (0.1, 0.0003), (0.03, 0.001)],
    ),
}
PLACES = {"digits": ("digits", {})} | {  # what is shown -> (config, fields)
    f"CIFAR-10, alpha {alpha:g}": ("cifar10", {"partition.alpha": alpha}) for alpha in (0.6, 0.1, 0.05)
}
SEEDED = {"digits": ("seed", "partition.seed"), "cifar10": ("seed",)}
TUNING = {"digits": (9, 10, 11), "cifar10": (9,)}  # seeds
PIECES = {
    "6.7 kB of curvature a client and round": f"{TWELVE}:{BUDGET}",
    "3 kB": f"{TWELVE}:sketch.rank=20:sketch.budget=3000",
    "13 kB": f"{TWELVE}:sketch.rank=50:sketch.budget=13000",
    "32 kB": f"{TWELVE}:sketch.rank=50:sketch.budget=32000",
    "5 pairs of each client for the budget": f"{TWELVE}:sketch.rank=5",
    "10 pairs": f"{TWELVE}:sketch.rank=10",
    "20 pairs": f"{TWELVE}:sketch.rank=20",
    "50 pairs": f"{TWELVE}:sketch.rank=50",
    "20 pairs from a quarter of the clients": f"{TWELVE}:sketch.rank=20:sketch.share=0.25",
    "gradients in 8 bits": f"{EIGHT}:{BUDGET}",
    "gradients in float32": BUDGET,
    "pairs in 6 bits": f"{TWELVE}:sketch.rank=20:sketch.budget=5000:sketch.bits=6",
}
PIECES = {label: f"fipa_few_bytes:aggregator.damping=0.01:{fields}" for label, fields in PIECES.items()}
PIECES["all 50 pairs in float32, past cohorts (`fipa_memory`)"] = "fipa_memory:aggregator.damping=0.003"
SPAN_PIECES = {  # of the span, at equal rounds
    "as it is": "",
    "50 directions": "aggregator.span.columns=50",
    "200": "aggregator.span.columns=200",
    "two new ones a round": "aggregator.span.fresh=2",
    "all clients asked": "sketch.share=1",
    "no guess of what nobody was asked about": "aggregator.span.prior=0",
    "a guess for as much as a whole cohort": "aggregator.span.prior=1",
    "all that was said for as much: decay 1": "aggregator.span.decay=1",
    "decay 0.9": "aggregator.span.decay=0.9",
    "all in float32, all clients asked": "aggregator.span.bits=0:sketch.bits=0:local.compress.name=none:sketch.share=1",
    "cores in 4 bits": "sketch.bits=4",
    "directions in 8 bits": "aggregator.span.bits=8",
    "directions in 3 bits": "aggregator.span.bits=3",
    "damping at least 0.1": "aggregator.damping=0.1",
    "damping at least 0.3": "aggregator.damping=0.3",
    "one direction of each loss's Hessian": "sketch.loss_rank=1",
}
SPAN_PIECES = {label: f"fipa_span:{fields}".rstrip(":") for label, fields in SPAN_PIECES.items()}
FULL = "50 eigenpairs of each client in float32 (`fipa_memory`)"
ON_CIFAR = (
    "as it is",
    "50 directions",
    "200",
    "all clients asked",
    "no guess of what nobody was asked about",
    "all in float32, all clients asked",
    "directions in 3 bits",
)
SPAN_TASKS = {  # config -> (fields, pieces)
    "digits": ({"fipa.rounds": 150}, SPAN_PIECES | {FULL: "fipa_memory:aggregator.damping=0.003"}),
    "cifar10": (
        {"fipa.rounds": 160, "partition.alpha": 0.1},
        {label: SPAN_PIECES[label] for label in ON_CIFAR}
        | {"as it is, 50 rounds": "fipa_span:rounds=50", f"{FULL}, 50 rounds": "fipa_memory:rounds=50"},
    ),
}
MORE = "cifar10, 1.5 times the bytes of averaging"
PAST = "aggregator.past.rank=250:aggregator.past.decay=0.97"
SELDOM = f"fipa_few_bytes:{EIGHT}:sketch.rank=40:sketch.share=0.1:{PAST}"  # chosen by hand on seed 9
HELD_OUT, LAST = "holdout_accuracy", 3
# What is chosen, or follows from the bytes.
OWN = (
    "aggregator.damping",
    "sketch.rank",
    "sketch.bits",
    "local.lr",
    "server.lr",
    "rounds",
)
OFTEN = {"eval.every": 5, "eval.clients_every": 0}


def _tried(config):
    """{label: its settings}."""
    natural, plain, adam = GRIDS[config]
    grids = natural, plain, adam, plain, plain, plain, plain
    return {
        label: [_for(rounds, method.format(*numbers)) for numbers in grid]
        for (label, method), rounds, grid in zip(RULES.items(), ROUNDS[config], grids, strict=True)
    }


def _for(rounds, method):
    """The method for so many rounds, unless it says itself for how many."""
    return method if ":rounds=" in method else f"{method}:rounds={rounds}"


def _run(config, fields, methods, **others):
    """From a warm-up: of digits one for each seed, of CIFAR-10 one for each alpha."""
    fields = OFTEN | fields
    warm = Run(config, fields | {"fipa.rounds": 0}, seeded=SEEDED[config], seeds=() if config == "digits" else (0,))
    return Run(config, fields | {"compare": tuple(methods)}, seeded=SEEDED[config], start=warm, **others)


def _runs():
    for config, fields in (("digits", {}), ("cifar10", {"partition.alpha": 0.1})):
        yield f"{config} tune", _run(config, fields, every(_tried(config)), seeds=TUNING[config])
    yield "pieces", _run("digits", {}, PIECES.values())
    for config, (fields, pieces) in SPAN_TASKS.items():
        yield f"{config} span pieces", _run(config, fields, pieces.values())
    yield MORE, _run("cifar10", {"fipa.rounds": 50, "partition.alpha": 0.1}, [SELDOM])
    for place, (config, fields) in PLACES.items():
        yield f"{place}, span", _run(config, fields, [_span(BYTES[config])])
        yield f"{place}, few bytes down", _run(config, fields, [_span(BYTES[config], FEW)])


def _span(most, fields=""):
    """FIPA in the span of gradients, until so many bytes are sent."""
    return f"fipa_span:{fields}rounds=2000:most_bytes_up={most:g}"


def _chosen(found, config):
    tuned = chosen(found, f"{config} tune", _tried(config), HELD_OUT, LAST)
    return {label: spec for label, spec in tuned.items() if spec}


def _lines(found, place):
    """{label: (run, method)} of what has run at a place."""
    config = PLACES[place][0]
    lines = {label: (place, spec) for label, spec in _chosen(found, config).items()}
    lines = {SPAN: (f"{place}, span", _span(BYTES[config]))} | lines
    lines[FEW_DOWN] = f"{place}, few bytes down", _span(BYTES[config], FEW)
    return {label: line for label, line in lines.items() if sent(found, *line).size}


def then(found):
    """Every rule as tuned."""
    runs = {}
    for place, (config, fields) in PLACES.items():
        if methods := _chosen(found, config):
            runs[place] = _run(config, fields, methods.values())
    if methods := _long(found):
        runs[LONG] = _run(*PLACES["CIFAR-10, alpha 0.1"], methods.values())
    return runs


def _long(found):
    """{label: method} that send four times as much."""
    best = _chosen(found, "cifar10").get(ADAM)
    rounds = 4 * ROUNDS["cifar10"][[*RULES].index(ADAM)]
    return best and {SPAN: _span(FOUR_TIMES), ADAM: f"{best.rpartition(':')[0]}:rounds={rounds}"}


def _tuned_row(found, run, label, spec, limits, columns=SENT):
    """A row, with the accuracies after so many bytes as well, by default up and down."""
    row: dict[str, str | Spread] = usual_row(found, run, spec, label, LAST)
    for most in limits:
        row |= after_bytes(found, run, spec, most, LAST, columns)
    return row | {"chosen": "nothing" if label in (SPAN, FEW_DOWN) else own_fields(spec, OWN)}


def tables(found):
    """Accuracy, loss and bytes of each rule, and of FIPA with one piece changed."""
    made = []
    for place in PLACES:
        if lines := _lines(found, place):
            limits = [sent(found, *lines[label]).mean() for label in ("FIPA at few bytes", ADAM) if label in lines]
            rows = [_tuned_row(found, run, label, spec, limits) for label, (run, spec) in lines.items()]
            words = f"{place}: mean of the last three evaluations, and the standard deviation over seeds."
            made.append(Table(words, rows))
    if found.runs.get(LONG):
        limits = [times * BYTES["cifar10"] for times in (1, 2, 4)]
        rows = [_tuned_row(found, LONG, *line, limits, ("bytes_up",)) for line in (_long(found) or {}).items()]
        made.append(Table(f"{LONG}: what 50, 100 and 200 rounds of plain FedAvg send.", rows))
    rows = [usual_row(found, "pieces", spec, label, LAST) for label, spec in PIECES.items()]
    made.append(Table("Digits, 40 rounds: FIPA with one piece changed.", rows))
    for config, (fields, pieces) in SPAN_TASKS.items():
        if found.runs.get(run := f"{config} span pieces"):
            rows = [usual_row(found, run, spec, label, LAST) for label, spec in pieces.items()]
            if config == "cifar10" and found.runs.get(MORE):
                label = "40 eigenpairs in 8 bits of one client in every other round, gradients in 8 bits, 50 rounds"
                rows.append(usual_row(found, MORE, SELDOM, label, LAST))
            made.append(Table(f"{config}, {fields['fipa.rounds']} rounds: the span with one piece changed.", rows))
    return made


def draw(found, path):
    """The accuracies by what the clients send."""
    panels = {
        place: [(*line, label) for label, line in _lines(found, place).items()]
        for place in PLACES
        if found.runs.get(place)
    }
    if found.runs.get(LONG):
        panels[LONG] = [(LONG, spec, label) for label, spec in (_long(found) or {}).items()]
    draw_lines(panels or {"digits": []}, "test_accuracy", path, found, by=("bytes_up",))


STUDY = Study(
    words=__doc__,
    runs=dict(_runs()),
    then=then,
    tables=tables,
    draw=draw,
    caption="Test accuracy by the bytes that clients send up, mean and one standard deviation over the seeds",
    data=("cifar10",),
    reduced=fewer_images(" of CIFAR-10, 60 rounds of warm-up", {"warmup.rounds": 60}),
    gigabytes=3,
    hours=25,
)
