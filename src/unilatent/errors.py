"""Errors that are reported to users in one line."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that cannot be used; the message names field, value and fix in one line."""
