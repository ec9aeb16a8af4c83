"""Stage 1: pictures from contexts."""
