"""Users' loaders and parts in memory, and the random streams that they draw from."""
