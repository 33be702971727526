"""Crystals: atoms in a cell that repeats without end."""
