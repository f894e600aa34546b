"""Metrics, and what else is counted of a model."""
