"""The style sheet of a report's page."""

from __future__ import annotations

from gist_fast.report.colours import DARK, LIGHT, variables

# A picture is never drawn with letters smaller than 9.5 pixels: 69 pixels an inch at 10 points.
CSS = (
    f"""\
:root {{ color-scheme: light dark; {variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK)} }} }}
"""
    + """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
main { max-width: 70rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .6rem 1.25rem;
  margin: 0; padding: .9rem 1rem; background: var(--panel); border-radius: .5rem;
}
.facts dt { color: var(--muted); font-size: .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { max-width: 100%; overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .9rem; }
caption { caption-side: top; text-align: left; color: var(--muted); padding-bottom: .3rem; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; }
th.text { min-width: 12rem; }
td { max-width: min(30rem, 60vw); overflow-wrap: break-word; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.short { white-space: nowrap; max-width: none; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.25rem; margin: .75rem 0;
}
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg {
  display: block; width: 100%; height: auto;
  min-width: calc(var(--inches) * 68px); max-width: calc(var(--inches) * 115px);
}
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--muted); font-size: .9rem; max-width: 46rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .45rem; } }
@media print { .facts { border: 1px solid var(--line); } section { break-inside: avoid-page; } }
"""
)
