"""The battery that every plugin passes, first-party or third-party.

A distribution names itself in its pytest settings and imports the tests:

    [tool.pytest.ini_options]
    forge_distributions = ["acme-forge"]

    # tests/test_contracts.py
    from forge_kernel.testing.contracts import *
"""
