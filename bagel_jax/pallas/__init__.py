"""Kernels: per operation `api.py`, `reference.py` and a file a backend."""
