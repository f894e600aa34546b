"""First-party plugins of forge-kernel: every technique lives here, behind entry points."""
