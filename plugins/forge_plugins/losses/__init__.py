"""First-party plugins of the kind `losses`, one module each."""
