"""The networks, one file each; no serving logic."""
