"""First-party plugins of the kind `optimizers`, one module each."""
