"""First-party plugins of the kind `validators`, one module each."""
