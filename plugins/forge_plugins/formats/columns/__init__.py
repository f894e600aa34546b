"""Tables by column: layout, chunks, gathering, cache."""
