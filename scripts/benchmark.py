"""Measures this package beside others: python scripts/benchmark.py COMMAND [options]; COMMAND --help lists them.

products   H V: through the network, by explicit rows and for the last layer, beside one read of the rows
sketch     top eigenpairs of a trained CNN's curvature, beside matfree, curvlinops with scipy's eigsh, and jax's lobpcg
eigenpairs multiple and nearly multiple eigenvalues: errors, and whether convergence is claimed, against dense float64
sequence   a sequence model's sketch: seconds and memory, for the whole model, adapters and the last layer
head       the last layer's sketch in closed form, beside the same through the network and beside local training
merge      the server's merge: errors against float64, seconds and peak memory, beside one copy of the uploads
gauss_newton   how close FIPA stays to the centralised Gauss-Newton trajectory, by rank and number of rounds
step       a network's training step beside the floor of its operations, and its memory
convolution    GFLOP/s of a ResNet's convolutions within a loop: ours, XLA's, and XLA's with transposes by hand
startup    seconds to the first round, with nothing compiled before and with the cache of compiled programs
population time and memory of a round beside the number of all clients, of which a hundred take part
scaling    the same rounds, or the merge, on 1, 2, 4 devices, two processes: seconds, memory, whether a bit differs
sums       FIPA from sums beside FIPA from eigenpairs: errors, the server's and a client's seconds, fixed point
profile    a config's round, stage by stage: seconds, operations, memory; and a trace for the profiler
ragged     a round of clients of very different sizes, padded, beside the sum of the clients' own work
checkpoint rounds that are kept, one by one, beside the same rounds that are not
apart      how far apart the clients' curvatures and data are, at the model of a run's warm-up
deployment bytes of an upload, packed and unpacked; a round as bytes of server and clients beside a simulation's
private    rules with client-level differential privacy, each tuned on the same full grid, on fresh keys
messages   what a client says of its curvature: seconds and bytes, eigenpairs beside Kronecker factors, three models
robust     what one faulty client of five does to the step, by fault and rule, and by the caps
lowering   every stage of a round, lowered for a GPU and a TPU on this machine: float64 in it, and calls out of it
device     numerics and speed on an accelerator, see scripts/device_check.sh
round      one client's work in a round beside PyTorch, pfl, fedjax and Flower; and a FIPA round beside a FedAvg round

Every command takes --cpus (cores to run on, e.g. 0 or 0,1) and --out (a JSON file for all that was measured).
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks import timing

COMMANDS = [line.split()[0] for line in __doc__.split("\n\n")[1].splitlines()]


def main():
    parser = argparse.ArgumentParser(add_help=False, usage=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--cpus", default="")
    parser.add_argument("--out", default="")
    args, options = parser.parse_known_args()
    timing.use_cpus(args.cpus)  # before jax and numpy start
    result = importlib.import_module(f"benchmarks.{args.command}").run(options)
    if args.out:
        result = {"command": sys.argv[1:], "machine": timing.machine(), **result}
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
