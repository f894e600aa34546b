"""First-party plugins of the kind `gradients`, one module each."""
