"""What scripts/faults.py does to runs."""
