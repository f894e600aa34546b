"""First-party plugins of the kind `penalties`, one module each."""
