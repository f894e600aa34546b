"""First-party plugins of the kind `quantizers`, one module each."""
