"""What watches over a run: values, plugins, memory, the disk, and time."""
