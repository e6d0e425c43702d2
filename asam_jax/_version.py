"""The version, which setup.cfg reads without importing JAX."""

__version__ = "0.1.0"
