"""SVG and HTML elements as strings, with everything that is not markup escaped."""

from html import escape
from typing import Any


class Markup(str):
    """Text that is markup already."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """Return an element. Attributes: `class_` for `class`, `_` for `-`; children that are not markup are escaped.

    >>> tag("text", "a < b", x=1.25, class_="axis", text_anchor="end")
    '<text x="1.25" class="axis" text-anchor="end">a &lt; b</text>'
    """
    pairs = "".join(f' {_name(key)}="{escape(_text(value))}"' for key, value in attributes.items() if value is not None)
    inner = "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    return Markup(f"<{name}{pairs}>{inner}</{name}>")


def join(*parts: Any) -> Markup:
    """Return elements in a row."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _text(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
