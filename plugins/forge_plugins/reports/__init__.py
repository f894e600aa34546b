"""The picture of a run: run folder -> `RunData` -> charts -> one HTML page. Imports no torch."""
