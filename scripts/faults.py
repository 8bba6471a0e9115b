"""Does to runs what happens to runs, and prints what they make of it: python scripts/faults.py [COMMAND] [options].

kills      SIGKILL at random points and inside saves; every run is resumed until it ends
flips      single bits flipped in checkpoint files, files cut short
signals    SIGTERM and SIGINT: rounds lost, seconds to exit
hashes     the final model of runs that must not differ
disk       a full disk (as root: it mounts a tmpfs)
clients    faulty uploads under every aggregator
mistakes   mistakes in configs and flags
all        all of these, as they come

COMMAND --help lists its options.
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
    for name in COMMANDS if args.command == "all" else (args.command,):
        command = importlib.import_module(f"harness.{name}")
        own = argparse.ArgumentParser(prog=f"faults.py {name}", description=command.__doc__)
        command.add_options(own)
        began = time.perf_counter()
        found = command.run(own.parse_args(options if args.command != "all" else []))
        print(f"\n{name}, {time.perf_counter() - began:.0f} s")
        for figure, value in found.items():
            print(f"  {figure:<45} {value}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
