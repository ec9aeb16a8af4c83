"""Stands in for OpenCV, which the official code imports but calls only where it augments training data."""
