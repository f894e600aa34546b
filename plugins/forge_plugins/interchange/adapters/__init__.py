"""Adapters in the layouts of other programs."""
