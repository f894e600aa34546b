"""Pure functions and modules on torch and numpy: no kernel, no configuration."""
