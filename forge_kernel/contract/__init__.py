"""What the author of a plugin sees: hooks, values, data, results. Imports no torch."""
