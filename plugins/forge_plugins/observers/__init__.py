"""First-party plugins of the kind `observers`, one module each."""
