"""The battery that forge-kernel asks of every plugin."""

from forge_kernel.testing.contracts import *  # noqa: F403  pytest collects what is imported
