"""Pure functions on tensors: diffusion, feature distances, geometry, EMA profiles. No weights, no files."""
