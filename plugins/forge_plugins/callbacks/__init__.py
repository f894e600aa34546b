"""First-party plugins of the kind `callbacks`, one module each."""
