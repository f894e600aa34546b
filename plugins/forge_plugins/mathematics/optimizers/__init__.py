"""Optimizers, learning rate curves, averages of weights."""
