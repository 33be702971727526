"""Training: one straight loop that knows neither a paper nor a modality."""
