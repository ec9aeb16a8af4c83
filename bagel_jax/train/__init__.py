"""Training: objectives, data, optimiser, checkpoints, results. `python -m bagel_jax.train CONFIG` runs it."""
