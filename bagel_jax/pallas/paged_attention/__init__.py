"""Ragged paged attention under prefix-bidirectional masks; `api.py` is the way in."""
