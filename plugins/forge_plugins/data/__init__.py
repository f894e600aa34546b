"""First-party plugins of the kind `data`, one module each."""
