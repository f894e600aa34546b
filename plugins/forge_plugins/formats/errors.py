"""What is wrong with a data file: where, what, and how to mend it."""

from __future__ import annotations

from pathlib import Path


class DataError(Exception):
    """A data file that cannot be read as asked.

    Args:
        file: the file.
        message: what is wrong.
        record: number of the record, counted from 0, if it is known.
        field: name of the field or of the object inside the file.
        place: another place, such as `line 3` or `byte 17`.
        hint: how to mend it.
    """

    def __init__(
        self,
        file: Path,
        message: str,
        *,
        record: int | None = None,
        field: str | None = None,
        place: str | None = None,
        hint: str = "",
    ) -> None:
        self.file, self.message, self.record, self.field = file, message, record, field
        self.place, self.hint = place, hint
        where = [str(file)]
        if place is not None:
            where.append(place)
        if record is not None:
            where.append(f"record {record}")
        if field is not None:
            where.append(f"field '{field[:80]}'")
        super().__init__(f"{', '.join(where)}: {message}" + (f"; {hint}" if hint else ""))

    def to_data(self) -> dict[str, str | int | None]:
        """All but the file, for JSON; named as the arguments are."""
        return {
            "message": self.message, "record": self.record, "field": self.field,
            "place": self.place, "hint": self.hint,
        }  # fmt: skip
