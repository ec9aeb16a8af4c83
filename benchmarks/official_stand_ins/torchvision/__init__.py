"""Stands in for torchvision; see `transforms`."""
