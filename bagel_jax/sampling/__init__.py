"""Schedule, guidance, forecasts, the choice of tokens: small and without an engine."""
