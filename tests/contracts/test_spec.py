"""The specification's table is what the tests claim."""

from __future__ import annotations

import spec_table


def test_every_claim_names_a_row() -> None:
    unknown = {
        row: where for row, where in spec_table.claims().items() if row not in spec_table.rows()
    }
    assert not unknown


def test_the_table_in_the_documentation_is_current() -> None:
    # Planted: a claim removed from one test.
    assert spec_table.TABLE.read_text(encoding="utf-8") == spec_table.table(), "run `make spec`"
