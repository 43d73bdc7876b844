"""The house's colours on paper and in the dark, by the name of the CSS variable that carries each."""

from __future__ import annotations

SERIES = ("blue", "vermilion", "green", "pink", "purple", "brown", "grey")
"""In the order in which a plot takes them; Okabe and Ito's, darker or lighter where the ground asks for it."""

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f4f6f8",
    "ink": "#1b2229",
    "muted": "#55606b",
    "line": "#d3d9df",
    "link": "#00598c",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#008a64",
    "pink": "#c2649a",
    "purple": "#6a4fb0",
    "brown": "#9a6700",
    "grey": "#6d7782",
}
DARK = {
    "paper": "#14181c",
    "panel": "#1d2329",
    "ink": "#e6eaee",
    "muted": "#a5b0bb",
    "line": "#3a444e",
    "link": "#7cc4f0",
    "blue": "#56b4e9",
    "vermilion": "#ff8f4a",
    "green": "#3cc79c",
    "pink": "#e29ac4",
    "purple": "#ab96f0",
    "brown": "#e6b450",
    "grey": "#98a3ae",
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


THEME = f"""\
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}"""
"""The CSS variables, for a page and for each of its pictures."""
