"""First-party plugins of the kind `phases`, one module each."""
