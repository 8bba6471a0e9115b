"""Does to runs what happens to runs, and prints what they make of it: python scripts/faults.py [COMMAND] [options].

kills      SIGKILL at random points and inside saves; every run is resumed until it ends
flips      single bits flipped in checkpoint files, files cut short
signals    SIGTERM and SIGINT: rounds lost, seconds to exit
hashes     the final model of runs that must not differ
disk       a full disk (as root: it mounts a tmpfs)
clients    faulty uploads under every aggregator
mistakes   mistakes in configs and flags
all        all of these, as they come

COMMAND --help lists its options. A promise that is not kept is marked, and the exit status is 1.
"""

import argparse
import importlib
import sys
import time

COMMANDS = ("kills", "flips", "signals", "hashes", "disk", "clients", "mistakes")


def main():
    parser = argparse.ArgumentParser(add_help=False, usage=__doc__)
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    args, options = parser.parse_known_args()
    names, options = (COMMANDS, []) if args.command == "all" else ((args.command,), options)
    sys.exit(int(not all([kept(name, options) for name in names])))


def kept(name: str, options: list[str]) -> bool:
    """Runs a command and prints its figures; whether all are as promised."""
    command = importlib.import_module(f"harness.{name}")
    parser = argparse.ArgumentParser(prog=f"faults.py {name}", description=command.__doc__)
    command.add_options(parser)
    began = time.perf_counter()
    found = command.run(parser.parse_args(options))
    is_kept = {
        figure: promise(found, found[figure]) if callable(promise) else found[figure] == promise
        for figure, promise in command.PROMISED.items()
    }
    print(f"\n{name}, {time.perf_counter() - began:.0f} s")
    for figure, value in found.items():
        mark = {True: "  as promised", False: "  BROKEN", None: ""}[is_kept.get(figure)]
        print(f"  {figure:<45} {value}{mark}", flush=True)
    return all(is_kept.values())


if __name__ == "__main__":
    main()
