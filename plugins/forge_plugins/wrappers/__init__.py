"""First-party plugins of the kind `wrappers`, one module each."""
