"""The version, apart from the package's public face, so that files that record it import nothing above them."""

__version__ = "0.1.0"
