"""The report's style sheet: one for both themes, with the colours of methods and accuracies as variables."""

from __future__ import annotations

from collections.abc import Iterable

from perdure.report.palette import LEVELS, PAPER, Style, fill_and_ink

_THEMES = {
    "light": f"--paper:{PAPER['light']};--ink:#1c2126;--quiet:#5a636c;--rule:#e1e5e9;--shade:#f5f7f9;--grid:#e8ebee",
    "dark": f"--paper:{PAPER['dark']};--ink:#e6e9ec;--quiet:#a0a9b2;--rule:#2d343c;--shade:#1b2128;--grid:#262d35",
}

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:70rem;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:1.9rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 .35rem}
h2{font-size:1.15rem;font-weight:650;margin:3rem 0 .35rem}
h3{font-size:.9rem;font-weight:600;margin:0 0 .4rem;display:flex;align-items:center;gap:.45rem}
p{margin:.35rem 0 .9rem;max-width:46rem}
.quiet,figcaption,.under{color:var(--quiet);font-size:.875rem}
.lead{font-size:1.1rem;margin-top:1.4rem;max-width:54rem}
.guide{font-size:.9rem;color:var(--quiet);line-height:1.65}
.guide b,.notes b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto;scrollbar-width:thin;margin:1rem 0 .6rem}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.55rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
thead th{font-weight:500;color:var(--quiet);vertical-align:bottom;white-space:normal;line-height:1.3;font-size:.8rem}
thead th small{display:block;font-size:.72rem;opacity:.9}
tbody th,thead th:first-child{text-align:left;position:sticky;left:0;background:var(--paper);font-weight:600}
th:first-child{padding-left:0}
th:last-child,td:last-child{padding-right:0}
td.best{font-weight:700}
td i{font-style:normal;font-weight:400;color:var(--quiet);font-size:.8rem}
td.cost,thead .cost{color:var(--quiet)}
.gap{padding-left:1.4rem}
.key{display:flex;flex-wrap:wrap;gap:.25rem 1.3rem;list-style:none;padding:0;margin:.7rem 0;font-size:.875rem}
.key li{display:flex;align-items:center;gap:.45rem}
.who{display:flex;align-items:center;gap:.55rem}
.sign{width:30px;height:14px;flex:none}
figure{margin:0}
svg{display:block;max-width:100%;height:auto}
.panels{display:grid;gap:1.5rem 1.75rem;margin-top:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,285px),1fr))}
.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,190px),1fr));gap:1rem 1.25rem;margin-top:.2rem}
.pictured{margin-top:1.1rem}
.grid{display:block;width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--rule)}
figcaption{margin-top:.3rem}
.wide{display:block}.narrow{display:none}
svg text{font-size:11.5px;fill:var(--quiet);font-family:inherit;font-variant-numeric:tabular-nums}
svg .name{font-size:12.5px;fill:var(--ink)}
svg .grid{stroke:var(--grid);fill:none}
svg .line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .dashed{stroke-dasharray:5 4.5}
svg .dot{fill:var(--c);stroke:var(--paper);stroke-width:1}
svg .band{fill:var(--c);opacity:.16}
svg .leader{stroke:var(--c);fill:none;opacity:.6}
svg .empty{fill:none;stroke:var(--rule)}
.heat g text{font-size:12px}
.fine{max-width:none}.fine text,.fine g text{font-size:10px}
.scale{display:flex;align-items:center;gap:.5rem;font-size:.8rem;color:var(--quiet);margin:.7rem 0 0}
.scale svg{width:150px}
.notes{padding-left:1.1rem;max-width:46rem;margin:.4rem 0;font-size:.9rem}
.notes li{margin:.3rem 0}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.3rem 1.5rem;font-size:.875rem;margin:.8rem 0}
dt{color:var(--quiet)}
dd{margin:0;overflow-wrap:anywhere}
details{margin:.6rem 0;font-size:.9rem}
summary{cursor:pointer;color:var(--quiet)}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--quiet);font-size:.8rem}
:focus-visible{outline:2px solid currentColor;outline-offset:3px}
@media(max-width:760px){.wide{display:none}.narrow{display:block}}
@media(max-width:620px){main{padding:1.6rem 1rem 3rem}h1{font-size:1.5rem}.lead{font-size:1rem}
h2{margin-top:2.3rem}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
@media print{main{max-width:none;padding:0}figure,tr{break-inside:avoid}}
"""


def style_sheet(styles: Iterable[Style]) -> str:
    """The whole sheet for methods drawn in these styles, in order (`m0`, `m1`, ...)."""
    chosen = list(styles)
    themes = {theme: ":root{" + rule + "}" + _colours(chosen, theme) for theme, rule in _THEMES.items()}
    return f"{themes['light']}{_RULES}@media(prefers-color-scheme:dark){{{themes['dark']}}}"


def _colours(styles: list[Style], theme: str) -> str:
    methods = "".join(f".m{k}{{--c:{getattr(style, theme)}}}" for k, style in enumerate(styles))
    cells = [(step, *fill_and_ink(step, theme)) for step in range(LEVELS + 1)]
    # As specific as the sheet's own rule for text in pictures, which would win otherwise.
    return methods + "".join(f"svg .h{k} rect{{fill:{fill}}}svg .h{k} text{{fill:{ink}}}" for k, fill, ink in cells)
