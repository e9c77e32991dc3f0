"""The version of the package, readable without importing it whole."""

__version__ = "0.1.0"
