"""Answers a question by runs, a table and a picture: python scripts/study.py NAME [--seeds ...] [--jobs ...].

python scripts/study.py --list                lists the studies of the folder studies/
python scripts/study.py sine                  runs what is not done yet, then writes docs/results/sine.md
python scripts/study.py rank --size=reduced --data-dir=DIR     at a size that a laptop does in an evening
python scripts/study.py sine --debug          shows in a minute that all parts run, and writes beside its runs alone

A study that is stopped goes on when the same command is given again. Its runs lie in runs/studies.
"""

import argparse
import runpy
import shlex
import sys
from pathlib import Path

from fipa_jax import config as config_lib

config_lib.prepare_process()

from evidence import page, running  # noqa: E402
from evidence.records import question  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of a file in studies/, without its ending")
    parser.add_argument("--list", action="store_true", help="print every study's question and leave")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="in place of the study's own")
    parser.add_argument("--only", nargs="+", default=[], help="names of runs; of the others, what is done is shown")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side; as cores and memory hold, by default")
    parser.add_argument("--size", choices=["full", "reduced"], default="full", help="how large the runs are")
    parser.add_argument("--debug", action="store_true", help="a few rounds of each run, on tiny data")
    parser.add_argument("--data-dir", default="", help="where scripts/prepare_data.py has put the data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies"), help="the folder of the runs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder whose results/NAME.md is written")
    parser.add_argument("--fresh", action="store_true", help="run again what is done, such as by other code")
    parser.add_argument("--write", action="store_true", help="start no run: write the page from those that are done")
    args = parser.parse_args()
    known = sorted(path.stem for path in (ROOT / "studies").glob("*.py"))
    if args.list:
        for name in known:
            print(f"{name:16} {question(load(name))}")
        return
    if args.name not in known:
        sys.exit(f"error: there is no study {args.name or 'without a name'!r}; known: {', '.join(known)}")
    try:
        sys.exit(conduct(args.name, load(args.name), args))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C; the same command goes on")


def load(name: str):
    """The study in studies/NAME.py."""
    return runpy.run_path(str(ROOT / "studies" / f"{name}.py"))["STUDY"]


def check_data(study, jobs, folder: str) -> None:
    """Refuses to start runs whose data sets are not there.

    Raises:
      ValueError: says how they are prepared.
    """
    absent = [data for data in study.data if not (Path(folder) / data).is_dir()]
    if absent and any("--config.data.dir=" in word for job in jobs for word in job.command):
        raise ValueError(
            f"needs the data of {' and '.join(absent)}: python scripts/prepare_data.py {absent[0]} --data-dir=DIR, "
            "then --data-dir=DIR here"
        )


def conduct(name: str, study, args) -> int:
    """Runs a study and writes its page; 1 if a run failed."""
    size = "debug" if args.debug else args.size
    folder = args.runs.absolute() / ("debug" if args.debug else "")
    found = results(name, study, args, running.Options(size, tuple(args.seeds), args.data_dir, folder, args.fresh))
    if not found.made:  # the page may have figures of earlier ones
        words = "; ".join(found.missing) or "name their folder by --runs"
        raise ValueError(f"no run of {name} is done in {folder}, so that its page stays as it is: {words}")
    shown = [name, *(["--debug"] if args.debug else ["--size=reduced"] if size == "reduced" else [])]
    shown += ["--seeds", *map(str, args.seeds)] if args.seeds else []
    shown += ["--data-dir=DIR"] if study.data else []
    command = shlex.join([".venv/bin/python", "scripts/study.py", *shown])
    print(page.write(name, study, found, command, folder / "docs" if args.debug else args.docs, size))
    for line in found.missing:
        print(f"missing: {line}", file=sys.stderr)
    return int(bool(found.missing))


def results(name: str, study, args, options):
    """What the study's runs leave, and then those that follow from what the first have tuned."""
    parallel = args.jobs or running.side_by_side(study.gigabytes)
    jobs, missing, found, known = [], [], None, set()
    for stage in (lambda _: running.runs_of(study, options), study.then):
        if not stage or missing:  # what is tuned by runs that are missing cannot be run
            break
        runs = stage(found)
        if not args.write:
            now = {run: value for run, value in runs.items() if not args.only or run in args.only}
            asked = running.jobs_of(study, now, options)
            running.check(study, now, options)
            check_data(study, asked, args.data_dir)
            missing += running.run(asked, parallel, name, args.fresh)
        jobs += running.jobs_of(study, runs, options)
        known |= {*runs}
        found = running.collect(jobs, missing)
    missing += [f"{run}: there is no such run, or what it follows from is not done" for run in {*args.only} - known]
    return found


if __name__ == "__main__":
    main()
