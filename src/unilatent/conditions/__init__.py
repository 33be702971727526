"""Conditions of a model (class, text, number): one file per condition."""
