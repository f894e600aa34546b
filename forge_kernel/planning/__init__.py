"""From a YAML file to a checked plan: all that happens before a device is touched."""
