"""First-party plugins of the kind `models`, one module each."""
