"""Pages of keys and values: who holds which, and what finished contexts are kept."""
