"""Stage 0: contexts and text."""
