"""Checkpoints of other code, converted to models of this package."""
