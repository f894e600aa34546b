"""A run tried on two samples before anything of it is kept; what is wrong, at its place."""
