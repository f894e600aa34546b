"""Every first-party plugin through the battery that third parties run."""

from forge_kernel.testing.contracts import *  # noqa: F403  pytest collects what is imported
