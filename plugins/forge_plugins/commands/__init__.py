"""Commands that need a technique; found through the entry points `forge_kernel.commands`."""
