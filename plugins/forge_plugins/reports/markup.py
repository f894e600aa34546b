"""Text that is safe inside HTML and SVG."""

from __future__ import annotations

import html
import re
from typing import Final

# Not allowed in XML; lone surrogates (JSON may bring them) cannot even be written as UTF-8.
_FORBIDDEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escaped(text: object) -> str:
    """The text for element content and quoted attributes; forbidden characters are replaced."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(text)), quote=True)


def element(name: str, content: str = "", **attributes: object) -> str:
    """An element around finished markup.

    Args:
        name: the tag.
        content: markup, already escaped.
        attributes: escaped here; a trailing underscore is dropped (`class_`), other underscores
            become hyphens, None leaves the attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>"
