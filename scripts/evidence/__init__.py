"""What `scripts/study.py` is made of; the studies themselves lie in `studies/`."""
