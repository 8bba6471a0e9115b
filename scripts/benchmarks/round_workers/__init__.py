"""One client's epoch in other libraries, each a program for an interpreter of its own: python -m ..._worker SPEC."""
