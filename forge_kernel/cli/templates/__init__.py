"""What `forge new plugin` writes: a package named new-plugin, kind by kind.

Each file is what a user gets but for the names, so that linters, type checkers and tests see it.
"""
