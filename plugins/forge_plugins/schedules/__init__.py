"""First-party plugins of the kind `schedules`, one module each."""
