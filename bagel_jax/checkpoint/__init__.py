"""Reading published BAGEL checkpoints, and writing and reading converted ones."""
