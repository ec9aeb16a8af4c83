"""Stage 1: images from contexts."""
