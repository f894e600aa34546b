"""First-party plugins of the kind `regularizers`, one module each."""
