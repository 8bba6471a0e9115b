"""How do a study's runs get done? As processes side by side, each in a folder that its config names."""

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from evidence.records import Benchmark, Found, Run, Runs, Study
from fipa_jax.config import command_line, fields
from fipa_jax.config.checks import validate
from fipa_jax.config.defaults import default
from fipa_jax.reporting import metrics
from fipa_jax.run import phase_parts

SCRIPTS = Path(__file__).resolve().parents[1]
MADE = "made.json"  # in a run's folder: that it is done, where and when
FIGURES = "figures.json"  # what a benchmark leaves
MOST_IN_DEBUG = 2  # runs of a study that are shown to run; the configs of all are read


class Options(NamedTuple):
    """How a study is run."""

    size: str = "full"  # full, reduced, debug
    seeds: tuple[int, ...] = ()  # () for those of the study
    data_dir: str = ""
    folder: Path = Path("runs/studies")  # of all runs: two studies that share a warm-up share its folder
    fresh: bool = False  # run again what is done, or was begun by other code


class Job(NamedTuple):
    """One process."""

    runs: tuple[str, ...]  # what the study calls it; () for a warm-up that others begin with
    seed: int
    command: tuple[str, ...]
    folder: Path
    rounds: int  # in all its phases
    after: Path | None  # the folder of the job that must be done before


def jobs_of(study: Study, runs: Runs, options: Options) -> list[Job]:
    """Every process that runs of a study take, warm-ups that others begin with first.

    Raises:
      ValueError: a config or a field of it is wrong; names it.
    """
    jobs: dict[Path, Job] = {}
    runs = dict(list(runs.items())[:MOST_IN_DEBUG]) if options.size == "debug" else runs
    for name, run in runs.items():
        for seed in run.seeds or seeds_of(study, options):
            make = _benchmark_job if isinstance(run, Benchmark) else _training_job
            for job in make(study, name, run, seed, options):
                known = jobs[job.folder].runs if job.folder in jobs else ()
                jobs[job.folder] = job._replace(runs=tuple(dict.fromkeys(known + job.runs)))
    return sorted(jobs.values(), key=lambda job: job.after is not None)


def runs_of(study: Study, options: Options) -> Runs:
    """The runs with which a study begins."""
    small = study.reduced.runs if options.size == "reduced" and study.reduced else {}
    return small or study.runs


def check(study: Study, runs: Runs, options: Options) -> None:
    """Refuses runs of which a compared method does not fit, with a ValueError, before any begins."""
    for run in runs.values():
        if isinstance(run, Run):
            run = _sized(study, run, options)
            phase_parts.check(_config_of(run.config, _fields_of(study, run, 0, options)))


def seeds_of(study: Study, options: Options) -> tuple[int, ...]:
    """The seeds of runs that have none of their own."""
    small = study.reduced.seeds if options.size == "reduced" and study.reduced else ()
    return options.seeds or (study.seeds[:1] if options.size == "debug" else small or study.seeds)


def _training_job(study: Study, name: str, run: Run, seed: int, options: Options) -> Iterable[Job]:
    """The job of a run, after that of the one it begins with."""
    run = _sized(study, run, options)
    changed, start = _fields_of(study, run, seed, options), None
    if run.start:
        first = seed if seed in (run.start.seeds or (seed,)) else run.start.seeds[0]
        *_, start = _training_job(study, "", run.start, first, options)
        yield start
        before = _config_of(_sized(study, run.start, options).config, _fields_of(study, run.start, first, options))
        changed |= {"warmup.rounds": 0, "first_round": before.first_round + before.warmup.rounds}
    config = _config_of(run.config, changed)
    folder = options.folder / f"{run.config.replace(':', '-')}-{_digest([_own(config), start and start.folder.name])}"
    if start:
        changed["init_from"] = str(start.folder / "warmup.msgpack")
    if config.task.name == "images" and config.data.name != "digits":
        changed["data.dir"] = options.data_dir
    changed["fipa.max_skips"] = 0  # a setting that diverges loses, and ends none of the others
    flags = [f"--config.{field}={value}" for field, value in changed.items()]
    command = (str(SCRIPTS / "train.py"), f"--config={run.config}", *flags, f"--workdir={folder}")
    command = (*command, "--resume=no") if options.fresh else command
    yield Job((name,) if name else (), seed, command, folder, _rounds_of(config), start and start.folder)


def _benchmark_job(study: Study, name: str, run: Benchmark, seed: int, options: Options) -> Iterable[Job]:
    """The job of a benchmark, after that of the run it begins with."""
    start = None
    if run.start:
        *_, start = _training_job(study, "", run.start, seed, options)
        yield start
    given = (*run.options, *(run.debug if options.size == "debug" else ()))
    filled = [
        option.format(
            seed=seed, start=start and start.folder, data=options.data_dir, configs=SCRIPTS.parent / "configs"
        )
        for option in given
    ]
    folder = options.folder / f"{run.command}-{_digest([given, seed, start and start.folder.name])}"
    command = (str(SCRIPTS / "benchmark.py"), run.command, *filled, f"--out={folder / FIGURES}")
    yield Job((name,), seed, command, folder, 1, start and start.folder)


def _digest(told) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def _own(config) -> dict:
    """What a config says beyond the defaults, {path: value}: a new field changes no folder's name."""
    usual = _usual()
    return {path: value for path, value in _flat(config.to_dict()) if value != usual.get(path)}


@functools.cache
def _usual() -> dict:
    return dict(_flat(default().to_dict()))


def _flat(group: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in group.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def _sized(study: Study, run: Run, options: Options) -> Run:
    """The run with the config that stands in for its own at this size."""
    configs = study.reduced.configs if options.size != "full" and study.reduced else {}
    return run._replace(config=configs.get(run.config, run.config))


def _fields_of(study: Study, run: Run, seed: int, options: Options) -> dict[str, Any]:
    """The fields that a run changes in its config."""
    changed = dict(run.fields) | {field: seed for field in run.seeded}
    if options.size == "reduced" and study.reduced:
        config = _config_of(run.config, changed)
        smaller = study.reduced.fields.get(config.data.name if config.task.name == "images" else "", {})
        changed |= {field: value for field, value in smaller.items() if changed.get(field) != 0}  # a warm-up stays one
    return changed | (_tiny(_config_of(run.config, changed)) if options.size == "debug" else {})


def _tiny(config) -> dict[str, Any]:
    """Fields that make a run so small that it only shows that all parts run; images are those that need no download."""
    changed: dict[str, Any] = {"warmup.rounds": min(config.warmup.rounds, 2), "fipa.rounds": min(config.fipa.rounds, 2)}
    changed["compare"] = tuple(dict.fromkeys(re.sub(r":rounds=\d+", "", spec) for spec in config.compare[:4]))
    changed["eval.every"] = changed["rounds_per_call"] = 1
    if config.task.name == "images":
        changed |= {"data.name": "digits", "data.test_split": "", "data.train_split": "train[:200]", "data.side": 0}
        changed |= {"data.augment": False, "data.flip": False, "data.rotation": 0.0, "model.head_width": 0}
        changed |= {"partition.num_clients": 4, "cohort": 2, "fipa.sketch.rank": 5}
        changed |= {"model.name": "cnn_6k"} if config.model.name != "mlp" else {}
        changed |= {f"{phase}.local.epochs": 1 for phase in ("warmup", "fipa")}
    return changed


def _config_of(name: str, changed: Mapping[str, Any]):
    """A config by its name, with fields changed.

    Raises:
      ValueError: there is no such config or field, or a value does not fit.
    """
    return _checked_config(name, tuple(changed.items()))


@functools.cache  # checking takes most of a large study's start, and runs that begin alike ask for the same
def _checked_config(name: str, changed: tuple[tuple[str, Any], ...]):
    name, _, variant = name.partition(":")
    config = runpy.run_path(str(command_line.config_file(name)))["get_config"](*([variant] if variant else []))
    for path, value in changed:
        try:
            group, field = fields.find(config, path)
        except KeyError as error:
            raise ValueError(f"config.{path}: {error.args[0]}") from None
        group[field] = value
    validate(config)
    return config


def _rounds_of(config) -> int:
    """Rounds of all phases."""
    told = [re.search(r":rounds=(\d+)", spec) for spec in config.compare]
    return config.warmup.rounds + sum(int(found[1]) if found else config.fipa.rounds for found in told)


def run(jobs: list[Job], parallel: int, words: str, fresh: bool = False) -> list[str]:
    """Runs what is not done yet, or all if `fresh`; one line says how far all are.

    There are `parallel` processes at a time, each on its own cores. One that is stopped goes on when the study is run
    again; one that fails does not end the others.

    Returns:
      One line for each job that is not done.
    """
    from tqdm import tqdm

    cores = sorted(os.sched_getaffinity(0))
    places: queue.SimpleQueue = queue.SimpleQueue()
    for place in range(parallel):
        places.put(cores[place::parallel] or cores)
    done: dict[Path, Future] = {}
    for job in jobs if fresh else ():
        (job.folder / MADE).unlink(missing_ok=True)
    with ThreadPoolExecutor(parallel) as pool, contextlib.ExitStack() as held:
        held.callback(pool.shutdown, cancel_futures=True)
        for job in jobs:
            done[job.folder] = pool.submit(_finish, job, done.get(job.after), places)
        bar = held.enter_context(tqdm(total=sum(job.rounds for job in jobs), desc=words, unit="round", disable=None))
        while not all(future.done() for future in done.values()):
            time.sleep(0.5)
            bar.update(sum(map(_rounds_done, jobs)) - bar.n)
            bar.set_postfix_str(f"{sum(future.done() for future in done.values())} of {len(jobs)} runs")
        bar.update(sum(map(_rounds_done, jobs)) - bar.n)
    told = {job: done[job.folder].result() for job in jobs}
    return [f"{' and '.join(job.runs) or 'warm-up'}, seed {job.seed}: {words}" for job, words in told.items() if words]


def _finish(job: Job, before: Future | None, places: queue.SimpleQueue) -> str:
    """Runs a job unless it is done; what is wrong, in one line, or "" if nothing is."""
    if before and before.result():
        return "the run that it begins with is missing"
    if is_done(job):
        return ""
    cores, began = places.get(), time.time()
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        os.sched_setaffinity(0, cores)  # of this thread, and so of the process that it starts
        with (job.folder / "output.txt").open("a") as output:
            code = subprocess.run([sys.executable, *job.command], stdout=output, stderr=subprocess.STDOUT).returncode
    finally:
        places.put(cores)
    if code:
        said = (job.folder / "output.txt").read_text().strip()
        if "of another origin" in said[-2000:]:
            return "was begun by other code; --fresh begins it anew"
        return f"exit status {code}: {' '.join(said.splitlines()[-1:])}"
    (job.folder / MADE).write_text(json.dumps(_origin(job, began, len(cores)), indent=1) + "\n")
    return ""


def is_done(job: Job) -> bool:
    """Whether a job has run to its end, now or before."""
    return (job.folder / MADE).is_file()


def _rounds_done(job: Job) -> int:
    if is_done(job):
        return job.rounds
    with contextlib.suppress(FileNotFoundError), (job.folder / "metrics.jsonl").open("rb") as file:
        return min(sum(1 for _ in file), job.rounds)
    return 0


def _origin(job: Job, began: float, cores: int) -> dict:
    """Where and when a job was done, and how long its rounds took."""
    origin = job.folder / "origin.json"
    if origin.is_file():
        versions = json.loads(origin.read_text())["code"]
        rows = metrics.read(job.folder / "metrics.jsonl")
        seconds = sum(value for row in rows for name, value in row.items() if name.startswith("seconds_"))
    else:
        versions = json.loads((job.folder / FIGURES).read_text())["machine"]["versions"]
        seconds = time.time() - began
    return {
        "command": " ".join(job.command[:1]).rpartition("/")[2] + " " + " ".join(job.command[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "cores": cores,
        "processor": _processor(),
        "versions": versions | {"python": sys.version.split()[0]},
    }


def _processor() -> str:
    """What the processor is called."""
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return names[0] if names else ""
    return ""


def collect(jobs: list[Job], missing: list[str]) -> Found:
    """What the jobs have left; those that are not done yet are missing."""
    runs: dict[str, dict[int, Any]] = {name: {} for job in jobs for name in job.runs}
    made = []
    for job in jobs:
        if not is_done(job):
            continue
        made.append(json.loads((job.folder / MADE).read_text()))
        if job.runs:
            figures = job.folder / FIGURES
            left = json.loads(figures.read_text()) if figures.is_file() else metrics.read(job.folder / "metrics.jsonl")
            for name in job.runs:
                runs[name][job.seed] = left
    return Found(runs, made, missing, len(jobs))


def side_by_side(gigabytes: float) -> int:
    """How many runs the cores and the free memory of this machine hold."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(free / gigabytes)))
