"""First-party plugins of the kind `exporters`, one module each."""
