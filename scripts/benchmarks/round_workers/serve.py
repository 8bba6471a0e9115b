"""What the workers share: they say what they are, then time their variants as they are asked, line by line."""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

EPOCHS = 5  # that a time is the mean of: one is too short for the clock


def spec() -> dict:
    """What to run, from the command line.

    Of a CNN: channels, hidden; of a ResNet: widths, blocks; of both: classes, examples, batch, lr and weights, a file
    of ours to start from.
    """
    return json.loads(sys.argv[1])


def user_seconds() -> float:
    """User CPU seconds of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def family_seconds() -> float:
    """User CPU seconds so far of this process, its descendants, and those of them that have ended, by /proc."""
    parents, seconds = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(folder.name)] = int(fields[1])
        seconds[int(folder.name)] = (int(fields[11]) + int(fields[13])) / os.sysconf("SC_CLK_TCK")

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return sum(value for pid, value in seconds.items() if ours(pid))


def serve(
    versions: str,
    variants: dict[str, Callable[[int], None]],
    logits: list,
    clock: Callable[[], float] = user_seconds,
) -> None:
    """Writes what there is to run, then for each variant's name read from stdin the user CPU seconds of its epoch.

    Args:
      versions: of the library and what it stands on.
      variants: {name: function that runs so many clients' epochs and waits for them}.
      logits: [B, K] of the first batch with our weights, to be compared with ours.
      clock: user CPU seconds so far, of all processes that work for the variants.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        hello = {"versions": versions, "variants": list(variants), "logits": logits}
        print(json.dumps(hello), file=answers, flush=True)
        for line in sys.stdin:
            start = clock()
            variants[line.strip()](EPOCHS)
            print((clock() - start) / EPOCHS, file=answers, flush=True)
