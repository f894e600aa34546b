"""What a file holds, and how good it is."""
