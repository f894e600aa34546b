"""Losses as functions of outputs and targets."""
