"""A config becomes a run: the only package that imports all sides."""
