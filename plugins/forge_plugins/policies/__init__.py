"""First-party plugins of the kind `policies`, one module each."""
