"""Compiles for chips that this machine does not have."""
