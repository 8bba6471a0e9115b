"""When does a run make no progress any more?"""

from fipa_jax.aggregate.screening import REASONS
from fipa_jax.reporting.console import NOTED


class Stalled(Exception):
    """The run makes no progress."""


def check_progress(name: str, row: dict, skipped: int, most: int) -> None:
    """Ends a phase of which so many rounds in a row were skipped; 0 for never.

    Args:
      name: of the phase.
      row: of its last round.
      skipped: rounds up to that one that were skipped in a row.
      most: of them.

    Raises:
      Stalled: says what the last one lacked, and what to change.
    """
    if not 0 < most <= skipped:
        return
    counts = {words: row.get(f"rejected_{reason}") for reason, words in REASONS.items()}
    counts[NOTED["absent"]] = row.get("clients_absent")
    why = "; ".join(f"{count} clients: {words}" for words, count in counts.items() if count)
    raise Stalled(
        f"{name}: {skipped} rounds in a row were skipped, the last one round {row['round']}. In it: "
        f"{why or 'the new parameters were not finite'}. Lower local.lr or server.lr, look at the clients' data, lower "
        "least_clients, or raise max_skips (0: never stop)"
    )
