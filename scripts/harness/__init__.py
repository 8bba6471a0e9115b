"""What scripts/faults.py lets go wrong: a module for each kind of fault, with run() -> rows of what happened."""
