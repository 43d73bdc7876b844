"""An SVG file made fit to stand in an HTML page beside others: no id twice, named, and harmless."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from gist_fast.runtime.errors import InputError

_REFERENCE = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
_SVG = "{http://www.w3.org/2000/svg}"
_REFUSED = frozenset(("script", "style", "foreignObject", "iframe", "embed", "object", "animate", "set", "handler"))


def inline(svg: str, alt: str, name: str) -> tuple[str, float]:
    """`svg` as an element of a page, every id in it begun with `name`, and its width in inches.

    Args:
        svg: The file.
        alt: What it shows; becomes its ``<title>``, which also labels it.
        name: Of no other picture on the page.

    Raises:
        InputError: no words for those who do not see it; it is no SVG, or would run a script or load something.
    """
    if not alt.strip():
        raise InputError(f"{name}: no alt; say what the picture shows for those who do not see it.")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise InputError(f"{name}: is no SVG ({error}).") from None
    if root.tag not in ("svg", f"{_SVG}svg"):
        raise InputError(f"{name}: is no SVG, but <{_local(root.tag)}>.")
    inches = _inches(root)
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in ("metadata", "title")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        if element.tag in _REFUSED:
            raise InputError(f"{name}: holds <{element.tag}>, which a report does not.")
        element.attrib = dict(_attributes(element, name))
    title = ElementTree.Element("title", {"id": f"{name}-title"})
    title.text = alt
    root.insert(0, title)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title", "style": f"--inches: {inches:.2f}"}
    return ElementTree.tostring(root, encoding="unicode"), inches


def _attributes(element: ElementTree.Element, name: str) -> list[tuple[str, str]]:
    found = []
    for key, value in element.attrib.items():
        key = _local(key)
        if key.lower().startswith("on"):
            raise InputError(f"{name}: has the attribute {key!r}, which a report does not.")
        if key == "id":
            value = f"{name}-{value}"
        elif key in ("href", "src"):
            if not value.startswith(("#", "data:image/png", "data:image/jpeg")):
                raise InputError(f"{name}: refers to {value[:60]!r}; a report loads nothing.")
            value = f"#{name}-{value[1:]}" if value.startswith("#") else value
        elif "url(" in value.lower():
            rest = _REFERENCE.sub("", value)
            if "url(" in rest.lower():
                raise InputError(f"{name}: refers to {value[:60]!r}; a report loads nothing.")
            value = _REFERENCE.sub(rf"url(#{name}-\1)", value)
        found.append((key, value))
    return found


def _inches(root: ElementTree.Element) -> float:
    """The width of the drawing, of which 72 units are an inch."""
    box = re.split(r"[\s,]+", root.get("viewBox", "").strip())
    try:
        width = float(box[2])
    except (IndexError, ValueError):
        raise InputError("picture: its SVG has no viewBox, so it could not take a page's width.") from None
    return width / 72


def _local(name: object) -> str:
    return str(name).rpartition("}")[2]
