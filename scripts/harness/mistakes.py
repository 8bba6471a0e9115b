"""What does a mistake in a config say? Starts scripts/train.py with each, and looks at what a person gets to see.

That must be one line that names the mistake, within `SECONDS`; and nothing may be written or moved.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CIFAR10, OWN_DATA = (f"--config={ROOT}/configs/{name}.py" for name in ("cifar10", "own_data"))
SECONDS = 2.0  # that an error may take, on a quiet core

# Config files, each with one mistake, for the folder FILES of the flags below.
START = "from fipa_jax import config as config_lib\n\n\ndef get_config():\n    config = config_lib.default()\n"
FILES = {
    "syntax.py": START + "    config.fipa.rounds = (3\n    return config\n",
    "import.py": "from fipa_jax.config import recipies\n",
    "name.py": START + "    confg.seed = 1\n    return config\n",
    "argument.py": "from fipa_jax.config import recipes\n\n\ndef get_config():\n    return recipes.images('cifar10')\n",
    "function.py": "from fipa_jax import config as config_lib\n\nCONFIG = config_lib.default()\n",
    "nothing.py": START + "    config.seed = 1\n",
    "dict.py": START + "    return config.to_dict()\n",
    "own.py": "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 0})\n",
    "field.py": START + "    config.fipa.rouns = 3\n    return config\n",
    "before.py": START + "    config.fipa.aggregator.max_step = 1.0\n    return config\n",
    "read_before.py": START + "    print(config.warmup.local.tries)\n    return config\n",
    "unlocked.py": START + "    config.fipa.unlock().sketch.memory = 1.0\n    return config\n",
    "group.py": START + "    config.fpia.rounds = 3\n    return config\n",
    "whole_group.py": START + "    config.fipa.local = {'lr': 0.1}\n    return config\n",
    "text.py": START + "    config.fipa.rounds = '3'\n    return config\n",
    "fraction.py": START + "    config.fipa.rounds = 1.5\n    return config\n",
    "none.py": START + "    config.seed = None\n    return config\n",
    "true.py": START + "    config.cohort = True\n    return config\n",
    "widths.py": START + "    config.model.widths = ('16', 16)\n    return config\n",
}

# name -> (flags, what the line must say)
MISTAKES = {
    # Names: of flags, fields and groups, and of what can be chosen.
    "misspelt flag": ("--workdri=here", "'workdri' workdir"),
    "resume": ("--resume=never", "resume never yes|no|anyway"),
    "no dashes": ("config.fipa.rounds=3", "config.fipa.rounds=3 --config.field=value"),
    "misspelt field": ("--config.fipa.rouns=3", "config.fipa.rouns 'rounds'"),
    "misspelt group": ("--config.fipa.loca.lr=3", "config.fipa.loca.lr 'local'"),
    "field of another group": ("--config.fipa.rank=3", "config.fipa.rank 'sketch.rank'"),
    "field of before": (
        "--config.fipa.aggregator.memory=prior",
        "config.fipa.aggregator.memory 'fipa.aggregator.past.kind'",
    ),
    "field of before, of the run": ("--config.client_memory=host", "config.client_memory 'client_store'"),
    "field of before, gone": ("--config.fipa.sketch.memory=1", "config.fipa.sketch.memory gone"),
    "field of before in a method": (
        "--config.compare=('fipa:local.step_scale=1',)",
        "config.compare 'local.step_scale' 'local.adaptive.scale'",
    ),
    "group for a field": ("--config.fipa=3", "config.fipa group rounds"),
    "field for a group": ("--config.seed.x=3", "config.seed.x value"),
    "task": ("--config.task.name=sin", "config.task.name 'sin' sine"),
    "equation": ("--config.task.name=pde --config.task.equation=poisson", "config.task.equation 'poisson' poisson_1d"),
    "model": ("--config.model.name=cnn", "config.model.name 'cnn' cnn_23k"),
    "activation": ("--config.model.activation=rleu", "config.model.activation 'rleu' relu"),
    "local optimiser": ("--config.fipa.local.optimizer=adamw", "local.optimizer 'adamw' adam"),
    "server optimiser": ("--config.fipa.server.optimizer=fedadam", "server.optimizer 'fedadam' adam"),
    "solver": ("--config.fipa.sketch.solver=lancsoz", "sketch.solver 'lancsoz' lanczos"),
    "jacobian": ("--config.fipa.sketch.jacobian=row", "sketch.jacobian 'row' rows"),
    "form": ("--config.fipa.aggregator.form=dampd", "aggregator.form 'dampd' damped"),
    "aggregator": ("--config.fipa.aggregator.name=fedavg", "aggregator.name 'fedavg' mean"),
    "term": ("--config.fipa.term.name=fedprox", "term.name 'fedprox' prox"),
    "compared method": ("--config.compare=('fipa','fedavgg')", "config.compare 'fedavgg' fedavg"),
    "methods without a tuple": ("--config.compare=fipa,fedavg", "config.compare 'fipa,fedavg' fipa_pinv"),
    "field of a method": ("--config.compare=('fedavg:server.lrr=1',)", "config.compare 'lrr' 'lr'"),
    "partition": (f"{CIFAR10} --config.partition.name=dirichelt", "config.partition.name 'dirichelt' dirichlet"),
    "data set": (f"{CIFAR10} --config.data.name=cifar1O --config.data.dir=FILES", "'cifar1O' config.data.dir"),
    "data folder": (f"{CIFAR10} --config.data.dir=FILES/nowhere", "'cifar10' config.data.dir prepare_data.py"),
    "split of own arrays": (f"{OWN_DATA} --config.task.split=columns", "config.task.split 'columns' column"),
    "precision": ("--config.precision=float16", "config.precision 'float16' float32"),
    "dtype of a basis": ("--config.fipa.sketch.store=bf16", "sketch.store 'bf16' bfloat16"),
    "dtype of a model": ("--config.model.compute_dtype=bfloat17", "config.model.compute_dtype bfloat16"),
    # Types and ranges.
    "text for a number": ("--config.seed=abc", "config.seed whole 'abc'"),
    "fraction for a count": ("--config.fipa.rounds=1.5", "config.fipa.rounds whole '1.5'"),
    "None": ("--config.fipa.local.lr=None", "config.fipa.local.lr number 'None'"),
    "NaN": ("--config.fipa.local.lr=nan", "config.fipa.local.lr nan"),
    "infinity": ("--config.fipa.aggregator.damping=inf", "config.fipa.aggregator.damping finite inf"),
    "negative": ("--config.fipa.local.lr=-0.1", "config.fipa.local.lr least -0.1"),
    "too large": ("--config.seed=99999999999999999999", "config.seed 2^31"),
    "no value": ("--config.fipa.rounds=", "config.fipa.rounds whole ''"),
    "text for a truth": ("--config.fipa.pooled=maybe", "config.fipa.pooled True 'maybe'"),
    "text in a tuple": ("--config.model.widths=abc", "config.model.widths tuple ('abc',)"),
    "open bracket": ("--config.model.widths=(16,", "config.model.widths tuple '(16,'"),
    "no unit in a layer": ("--config.model.widths=(0,)", "config.model.widths least 1"),
    "empty tuple": ("--config.compare=()", "config.compare tuple ()"),
    "numbers for methods": ("--config.compare=(1,2)", "config.compare tuple (1, 2)"),
    "value in a method": ("--config.compare=('fedavg:server.lr=fast',)", "config.compare server.lr number 'fast'"),
    "infinity in a method": (
        "--config.compare=('fipa:server.lr=inf',)",
        "config.fipa.server.lr finite inf 'fipa:server",
    ),
    "momentum": ("--config.fipa.local.momentum=2", "config.fipa.local.momentum [0, 1) 2"),
    "alpha": (f"{CIFAR10} --config.partition.alpha=0", "config.partition.alpha positive 0"),
    # Combinations.
    "cohort": ("--config.cohort=3", "config.cohort 3 2"),
    "cohort of images": (f"{CIFAR10} --config.cohort=101", "config.cohort 101 100"),
    "rank": ("--config.fipa.sketch.rank=1000", "sketch.rank 1000 321"),
    "trust with a cohort": ("--config.cohort=1", "config.fipa.aggregator.trust config.cohort"),
    "matched without Gauss-Newton": ("--config.fipa.local.optimizer=sgd", "config.fipa.local.matched gauss_newton"),
    "step scale of second order": ("--config.fipa.local.adaptive.scale=0.01", "local.adaptive.scale 0"),
    "term with Gauss-Newton": ("--config.fipa.term.name=prox", "local.optimizer gauss_newton term.name"),
    "body cached, all trained": ("--config.fipa.cache_body=True", "config.fipa.cache_body config.fipa.trainable"),
    "head's solver, all trained": ("--config.fipa.sketch.solver=head", "head trainable"),
    "rounds in one call, host": ("--config.client_store=host", "config.rounds_per_call config.client_store"),
    "pattern without a match": ("--config.fipa.trainable=Conv", "trainable 'Conv' Dense_0/bias"),
    "broken pattern": ("--config.fipa.trainable=(", "config.fipa.trainable regular"),
    "devices": ("--config.devices=64", "config.devices 64 there"),
    "no rounds": ("--config.fipa.rounds=0", "config.fipa.rounds nothing"),
    "images' model, no images": ("--config.model.name=cnn_6k", "config.model.name images mlp"),
    "mirrored digits": (f"{CIFAR10} --config.data.name=mnist", "config.data.flip False"),
    # Files.
    "no config file": ("--config=FILES/nonesuch.py", "--config nonesuch.py"),
    "folder for a config": ("--config=FILES", "--config no file"),
    "name of no config": ("--config=sinus", "--config 'sinus' poisson_1d, sine"),
    "config without a name": ("--config", "--config sine"),
    "variant": (f"--config={ROOT}/configs/sine.py:newton", "sine.py 'newton' gauss_newton, sgd"),
    "work directory is a file": ("--workdir=FILES/none.py", "--workdir none.py folder"),
    "work directory in a file": ("--workdir=FILES/none.py/x", "--workdir none.py folder"),
    "no such saved model": ("--config.init_from=nonesuch.msgpack", "config.init_from nonesuch.msgpack"),
    "another file's saved model": ("--config.init_from=FILES/none.py", "config.init_from none.py"),
    "no own arrays": (OWN_DATA, "config.task.file .npz"),
    "other file for own arrays": (f"{OWN_DATA} --config.task.file=FILES/none.py", "config.task.file none.py .npz"),
    "config file: syntax": ("--config=FILES/syntax.py", "never closed syntax.py line 6"),
    "config file: import": ("--config=FILES/import.py", "import.py line 1 'recipies'"),
    "config file: name": ("--config=FILES/name.py", "name.py line 6 'confg'"),
    "config file: argument": ("--config=FILES/argument.py", "argument.py line 5 'model'"),
    "config file: no get_config": ("--config=FILES/function.py", "function.py get_config()"),
    "config file: no return": ("--config=FILES/nothing.py", "needs got NoneType"),
    "config file: a dict": ("--config=FILES/dict.py", "needs got dict"),
    "config file: fields of its own": ("--config=FILES/own.py", "missing fipa_jax.config.default()"),
    "config file: field": ("--config=FILES/field.py", 'field.py line 6 "rouns" "rounds"'),
    "config file: field of before": (
        "--config=FILES/before.py",
        "before.py line 6 aggregator.max_step now aggregator.limits.max_step",
    ),
    "config file: field of before, read": (
        "--config=FILES/read_before.py",
        "read_before.py line 6 local.tries now local.gauss_newton.tries",
    ),
    "config file: field of before, unlocked": ("--config=FILES/unlocked.py", "config.fipa.sketch.memory gone"),
    "config file: group": ("--config=FILES/group.py", "group.py line 6 'fpia' \"fipa\""),
    "config file: group replaced": ("--config=FILES/whole_group.py", "config.fipa.local missing"),
    "config file: text": ("--config=FILES/text.py", "text.py line 6 'rounds' int"),
    "config file: fraction": ("--config=FILES/fraction.py", "fraction.py line 6 'rounds' 1.5"),
    "config file: None": ("--config=FILES/none.py", "config.seed whole None"),
    "config file: True for a count": ("--config=FILES/true.py", "config.cohort whole True"),
    "config file: text in a tuple": ("--config=FILES/widths.py", "config.model.widths tuple '16'"),
}


class Row(NamedTuple):
    """What a mistake led to."""

    mistake: str
    seconds: float
    line: str  # the last of what was printed as an error
    wrong: str  # about it; "" for nothing


def write_files(folder: Path) -> None:
    """Writes the config files with mistakes."""
    for name, text in FILES.items():
        (folder / name).write_text(text)


def flags(mistake: str, files: Path) -> list[str]:
    """The command line of a mistake."""
    return MISTAKES[mistake][0].replace("FILES", str(files)).split()


def unsaid(mistake: str, line: str) -> list[str]:
    """What the line should say of a mistake and does not."""
    return [text for text in MISTAKES[mistake][1].split(" ") if text not in line]


def start(mistake: str, folder: Path) -> Row:
    """Starts the script with a mistake, in an empty folder."""
    files, here = folder / "files", Path(tempfile.mkdtemp(dir=folder))
    if not files.exists():
        files.mkdir()
        write_files(files)
    command = [sys.executable, str(ROOT / "scripts/train.py"), *flags(mistake, files)]
    environment = os.environ | {"TQDM_DISABLE": "1", "TFDS_DATA_DIR": str(here / "nowhere")}
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=here, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return Row(mistake, 60.0, "", "runs on")
    lines = done.stderr.strip().splitlines()
    line = lines[-1] if lines else ""
    wrong = {
        "it ran": done.returncode == 0,
        f"{len(lines)} lines": len(lines) != 1,
        "no error": not line.startswith("error: "),
        f"does not say {unsaid(mistake, line)}": unsaid(mistake, line),
        "something was written": any(here.iterdir()),
    }
    return Row(mistake, time.perf_counter() - begin, line, ", ".join(name for name, true in wrong.items() if true))


PROMISED = {"whose error is not as it should be": 0}


def add_options(parser) -> None:
    parser.add_argument("--only", nargs="*", default=list(MISTAKES), choices=list(MISTAKES))


def run(args) -> dict:
    """Makes every mistake and prints a table: mistake, seconds, what the script says, what is wrong with that."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [start(mistake, Path(folder)) for mistake in args.only]
    print("| mistake | seconds | the script says |\n|---|---|---|")
    for row in rows:
        late = f"above {SECONDS} s" if row.seconds > SECONDS else ""
        marks = "".join(f" **{mark}**" for mark in (row.wrong, late) if mark)
        said = row.line.replace("|", "\\|")
        print(f"| {row.mistake} | {row.seconds:.2f} | {said}{marks} |")
    return {
        "mistakes": len(rows),
        "whose error is not as it should be": sum(bool(row.wrong) for row in rows),
        "seconds, median": round(statistics.median(row.seconds for row in rows), 2),
        "seconds, most": round(max(row.seconds for row in rows), 2),
        f"above {SECONDS} s": sum(row.seconds > SECONDS for row in rows),
    }
