"""Judging what a model makes by something it never saw."""
