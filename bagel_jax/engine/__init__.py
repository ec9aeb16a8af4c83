"""Two stages at work for many requests: `core` decides, `context` and `denoise` compute, drivers give time."""
