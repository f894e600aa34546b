"""Checkpoints and files that survive a crash."""
