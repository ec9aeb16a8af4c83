"""From a request to token ids, pixels, noise and a plan, on the host."""
