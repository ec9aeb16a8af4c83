"""Meshes of devices, and which axis of which parameter lies along which of them."""
