"""Grokfast: filters of gradients, and how their settings follow a run."""
