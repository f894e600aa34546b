"""Named columns of a file: what they become, fitted on the training share and kept."""
