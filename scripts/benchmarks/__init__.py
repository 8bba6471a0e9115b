"""The measurements of scripts/benchmark.py: a module for each command, with run(options) -> what it measured."""
