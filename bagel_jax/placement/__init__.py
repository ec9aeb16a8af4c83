"""Devices, meshes of them, and which axis of which parameter lies along which of them."""
