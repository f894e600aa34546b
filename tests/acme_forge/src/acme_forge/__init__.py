"""Plugins for forge-kernel by somebody else."""
