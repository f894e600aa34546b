"""`python -m forge_kernel` is `forge`."""

from forge_kernel.cli import main

main()
