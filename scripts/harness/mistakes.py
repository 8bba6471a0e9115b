"""What does a mistake in a config say? Runs the script with each, and checks what a person gets to see.

An error is one line that names the mistake, within seconds; nothing is written or moved.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 2.0  # that an error may take
# Config files with a mistake, put into a folder {files}, apart from that which the script runs in.
HEAD = "from fipa_jax import config as config_lib\n\n\ndef get_config():\n    config = config_lib.default()\n"
FILES = {
    "syntax.py": HEAD + "    config.fipa.rounds = (3\n    return config\n",
    "no_get_config.py": "from fipa_jax import config as config_lib\n\nCONFIG = config_lib.default()\n",
    "misspelt.py": HEAD + "    config.fipa.rouns = 3\n    return config\n",
    "misspelt_group.py": HEAD + "    config.fpia.rounds = 3\n    return config\n",
    "text_for_number.py": HEAD + "    config.fipa.rounds = '3'\n    return config\n",
    "fraction_for_count.py": HEAD + "    config.fipa.rounds = 1.5\n    return config\n",
    "none.py": HEAD + "    config.seed = None\n    return config\n",
    "true_for_count.py": HEAD + "    config.cohort = True\n    return config\n",
    "text_in_widths.py": HEAD + "    config.model.widths = ('16', 16)\n    return config\n",
    "returns_nothing.py": HEAD + "    config.seed = 1\n",
    "returns_dict.py": HEAD + "    return config.to_dict()\n",
    "of_its_own.py": "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({'seed': 0})\n",
    "wrong_import.py": "from fipa_jax import recipies\n" + HEAD + "    return config\n",
    "wrong_name.py": HEAD + "    confg.seed = 1\n    return config\n",
    "wrong_argument.py": "from fipa_jax import recipes\n\n\ndef get_config():\n    return recipes.images('cifar10')\n",
    "replaces_group.py": HEAD + "    config.fipa.local = {'lr': 0.1}\n    return config\n",
    "extra_field.py": HEAD + "    with config.unlocked():\n        config.fipa.epochs = 3\n    return config\n",
    "a_file": "",
}

P=ROOT/"configs"
MISTAKES = {
    # names
    "field": (["--config.fipa.rouns=3"], []),
    "field2": (["--config.sed=3"], []),
    "group": (["--config.fpia.rounds=3"], []),
    "inner group": (["--config.fipa.loca.lr=3"], []),
    "field of another group": (["--config.fipa.rank=3"], []),
    "flag": (["--workdri=here"], []),
    "no dashes": (["config.fipa.rounds=3"], []),
    "space": (["--config.fipa.rounds", "= 3"], []),
    "group set": (["--config.fipa=3"], []),
    "value as group": (["--config.seed.x=3"], []),
    "task": (["--config.task.name=sin"], []),
    "equation": (["--config.task.name=pde", "--config.task.equation=poisson"], []),
    "data name": ([f"--config={P}/cifar10.py", "--config.data.name=cifar1O", "--config.data.dir={files}"], []),
    "data dir": ([f"--config={P}/cifar10.py", "--config.data.dir={files}/nowhere"], []),
    "model": (["--config.model.name=cnn"], []),
    "activation": (["--config.model.activation=rleu"], []),
    "optimizer": (["--config.fipa.local.optimizer=adamw"], []),
    "solver": (["--config.fipa.sketch.solver=lancsoz"], []),
    "jacobian": (["--config.fipa.sketch.jacobian=row"], []),
    "form": (["--config.fipa.aggregator.form=dampd"], []),
    "aggregator": (["--config.fipa.aggregator.name=fedavg"], []),
    "weighting": (["--config.fipa.aggregator.weighting=example"], []),
    "merge": (["--config.fipa.aggregator.merge=svd"], []),
    "at": (["--config.compare=('fisher_diagonal:aggregator.at=home',)"], []),
    "term": (["--config.fipa.term.name=fedprox"], []),
    "server": (["--config.fipa.server.optimizer=fedadam"], []),
    "partition": ([f"--config={P}/cifar10.py", "--config.partition.name=dirichelt"], []),
    "npz split": ([f"--config={P}/own_data.py", "--config.task.split=columns"], []),
    "system": (["--config.fipa.local.system=chol"], []),
    "rule": (["--config.compare=('fipa','fedavgg')"], []),
    "rule field": (["--config.compare=('fipa','fedavg:server.lrr=1')"], []),
    "rule value": (["--config.compare=('fipa','fedavg:server.lr=fast')"], []),
    "rule nan": (["--config.compare=('fipa:server.lr=nan',)"], []),
    "rule no value": (["--config.compare=('fipa:server.lr',)"], []),
    "rule empty": (["--config.compare=('',)"], []),
    "precision": (["--config.precision=float16"], []),
    "store": (["--config.fipa.sketch.store=bf16"], []),
    "store int": (["--config.fipa.sketch.store=int8"], []),
    "compute dtype": ([f"--config={P}/sine.py", "--config.model.name=resnet20", "--config.model.compute_dtype=bfloat17"], []),
    "compute dtype mlp": (["--config.model.compute_dtype=bfloat17"], []),
    "compute dtype int": (["--config.model.name=resnet20", "--config.model.compute_dtype=int8"], []),
    "examples_on": (["--config.examples_on=gpu"], []),
    "client_memory": (["--config.client_memory=ram"], []),
    # types
    "seed text": (["--config.seed=abc"], []),
    "seed fraction": (["--config.seed=1.5"], []),
    "rounds fraction": (["--config.fipa.rounds=1.5"], []),
    "rounds exp": (["--config.fipa.rounds=1e3"], []),
    "widths int": (["--config.model.widths=16"], []),
    "widths text": (["--config.model.widths=abc"], []),
    "widths float": (["--config.model.widths=(16.5,)"], []),
    "widths neg": (["--config.model.widths=(-3,)"], []),
    "widths zero": (["--config.model.widths=(0,)"], []),
    "widths empty": (["--config.model.widths=()"], []),
    "widths syntax": (["--config.model.widths=(16,"], []),
    "widths strings": (["--config.model.widths=('a',)"], []),
    "widths list": (["--config.model.widths=[8,8]"], []),
    "bool text": (["--config.fipa.pooled=maybe"], []),
    "bool nr": (["--config.stage_seconds=2"], []),
    "none": (["--config.seed=None"], []),
    "none float": (["--config.fipa.local.lr=None"], []),
    "none str": (["--config.task.name=None"], []),
    "nan": (["--config.fipa.local.lr=nan"], []),
    "nan damping": (["--config.fipa.aggregator.damping=nan"], []),
    "inf": (["--config.fipa.local.lr=inf"], []),
    "inf damping": (["--config.fipa.aggregator.damping=inf"], []),
    "inf max_step": (["--config.fipa.aggregator.max_step=inf"], []),
    "neg lr": (["--config.fipa.local.lr=-0.1"], []),
    "neg rounds": (["--config.fipa.rounds=-1"], []),
    "nan boundary": (["--config.task.name=pde", "--config.task.boundary_weight=nan"], []),
    "compare str": (["--config.compare=fipa"], []),
    "compare str2": (["--config.compare=fipa,fedavg"], []),
    "compare empty": (["--config.compare=()"], []),
    "compare ints": (["--config.compare=(1,2)"], []),
    "compare twice": (["--config.compare=('fipa','fipa')"], []),
    "empty value": (["--config.fipa.rounds="], []),
    "huge seed": (["--config.seed=99999999999999999999"], []),
    "huge seed2": (["--config.seed=9999999999"], []),
    "huge int": (["--config.fipa.sketch.rank=99999999999"], []),
    "momentum 2": (["--config.fipa.local.momentum=2"], []),
    "energy nan": (["--config.fipa.sketch.energy=nan"], []),
    # combos
    "cohort": (["--config.cohort=3"], []),
    "rank": (["--config.fipa.sketch.rank=1000"], []),
    "trust cohort": (["--config.cohort=1"], []),
    "matched": (["--config.fipa.local.optimizer=sgd"], []),
    "cache_body": (["--config.fipa.cache_body=True"], []),
    "step_scale": (["--config.fipa.local.step_scale=0.01"], []),
    "rpc host": (["--config.client_memory=host"], []),
    "rpc host2": (["--config.examples_on=host"], []),
    "trainable none": (["--config.fipa.trainable=Conv"], []),
    "trainable regex": (["--config.fipa.trainable=("], []),
    "trainable empty": (["--config.fipa.trainable="], []),
    "devices": (["--config.devices=64"], []),
    "nothing": (["--config.fipa.rounds=0", "--config.warmup.rounds=0"], []),
    "head solver": (["--config.fipa.sketch.solver=head"], []),
    "dyn mu": (["--config.fipa.local.optimizer=sgd", "--config.fipa.local.matched=False", "--config.fipa.aggregator.trust=False", "--config.fipa.term.name=dyn", "--config.fipa.term.mu=0"], []),
    "gn term": (["--config.fipa.term.name=prox"], []),
    "lbfgs clip": (["--config.fipa.local.optimizer=lbfgs", "--config.fipa.local.matched=False", "--config.fipa.local.clip_norm=1"], []),
    "init_from": (["--config.init_from=nonesuch.msgpack"], []),
    "init_from dir": (["--config.init_from={files}"], []),
    "init_from other": (["--config.init_from={files}/misspelt.py"], []),
    "alpha": ([f"--config={P}/cifar10.py", "--config.partition.alpha=0"], []),
    "alpha neg": ([f"--config={P}/cifar10.py", "--config.partition.alpha=-1"], []),
    "alpha nan": ([f"--config={P}/cifar10.py", "--config.partition.alpha=nan"], []),
    "part 0": ([f"--config={P}/cifar10.py", "--config.partition.num_clients=0"], []),
    "shards 0": ([f"--config={P}/cifar10.py", "--config.partition.name=shards", "--config.partition.shards_per_client=0"], []),
    "part file": ([f"--config={P}/cifar10.py", "--config.partition.name=file"], []),
    "part file2": ([f"--config={P}/cifar10.py", "--config.partition.name=file", "--config.partition.file=nowhere.json"], []),
    "cohort images": ([f"--config={P}/cifar10.py", "--config.cohort=101"], []),
    "mlp images": ([f"--config={P}/cifar10.py", "--config.model.name=mpl"], []),
    "rule in images": ([f"--config={P}/cifar10.py", "--config.fipa.aggregator.form=x"], []),
    "part seed": ([f"--config={P}/cifar10.py", "--config.partition.seed=-1"], []),
    "task seed": (["--config.task.seed=-1"], []),
    "npz no file": ([f"--config={P}/own_data.py"], []),
    "npz file": ([f"--config={P}/own_data.py", "--config.task.file={files}/misspelt.py"], []),
    "num_clients 0": (["--config.task.num_clients=0"], []),
    "head_width": (["--config.model.head_width=-1"], []),
    "sine cnn": (["--config.model.name=cnn_6k"], []),
    "sine resnet": (["--config.model.name=resnet20"], []),
    "mnist flip": ([f"--config={P}/cifar10.py", "--config.data.name=mnist"], []),
    # files
    "config dir": (["--config=" + str(P)], []),
    "config dir abs": (["--config={files}"], []),
    "config none": (["--config={files}/nonesuch.py"], []),
    "config empty": (["--config="], []),
    "config nothing": (["--config"], []),
    "config not py": (["--config={files}/a_file"], []),
    "config name": (["--config=sine"], []),
    "variant": ([f"--config={P}/sine.py:newton"], []),
    "variant none": ([f"--config={P}/fashion_mnist.py:newton"], []),
    **{"file " + name: (["--config={files}/" + name], []) for name in FILES if name != "a_file"},
    "workdir file": (["--workdir={files}/a_file"], []),
    "workdir below file": (["--workdir={files}/a_file/x"], []),
    "workdir unwritable": (["--workdir=/proc/runs"], []),
    "workdir foreign": (["--workdir={files}"], []),
    "process": (["--process=1"], []),
    "processes abc": (["--processes=abc"], []),
    "extra": (["train"], []),
    "twice": (["--config.seed"], []),
}


class Row(NamedTuple):
    """What happened after a mistake."""

    name: str
    seconds: float
    error: str  # what was printed
    wrong: str  # with it; "" for nothing


def run(names=()):
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder)/"files"; files.mkdir()
        for n, t in FILES.items(): (files/n).write_text(t)
        for name, (flags, _) in MISTAKES.items():
            if names and name not in names: continue
            cwd = Path(tempfile.mkdtemp(dir=folder))
            start = time.perf_counter()
            try:
                r = subprocess.run([sys.executable, str(ROOT/"scripts/train.py"), *[f.replace("{files}", str(files)) for f in flags]], cwd=cwd, capture_output=True, text=True, timeout=8, stdin=subprocess.DEVNULL)
            except subprocess.TimeoutExpired as e:
                print(f"!!! {name}: {flags} RUNS ON", flush=True); continue
            s = time.perf_counter()-start
            err = r.stderr.strip()
            bad = []
            if r.returncode == 0: bad.append("ran")
            if not (err.startswith("error: ") and len(err.splitlines())==1): bad.append("notoneline")
            if list(cwd.iterdir()): bad.append("written")
            if s > 2: bad.append("slow")
            print(f"{'!!! ' if bad else ''}{name}: {' '.join(flags)} [{s:.2f}] {bad or ''}\n    {err[-700:]}", flush=True)

if __name__ == "__main__":
    run(sys.argv[1:])
