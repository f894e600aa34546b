"""The style sheet of a report: light and dark, colours that the colour-blind tell apart."""

from __future__ import annotations

from typing import Final

# After Okabe and Ito 2008, "Color Universal Design", darkened or lightened until each line has a
# contrast of at least 3 to its ground (WCAG 2.1, 1.4.11).
_LIGHT: Final = (
    "#0067a5", "#d1500c", "#00805f", "#b1508f", "#a87400", "#2f8fc7", "#6b5bb5", "#6a6f77",
)  # fmt: skip
_DARK: Final = (
    "#58b0ee", "#ff8f57", "#35c9a0", "#e69acb", "#ecbb45", "#9ad6f7", "#b3a5f2", "#b3b9c2",
)  # fmt: skip


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--series-{number}:{colour};" for number, colour in enumerate(colours))


STYLE: Final = (
    """
:root{color-scheme:light dark;
--page:#f5f6f8;--card:#fff;--text:#1b2330;--quiet:#5a6473;--edge:#e1e5ea;--grid:#eceff3;
--axis:#b4bcc7;--done:#0b7a4b;--done-ground:#e2f4ea;--stopped:#8a5a00;--stopped-ground:#fbf0d9;
--failed:#b3261e;--failed-ground:#fce8e6;--open:#0b5cad;--open-ground:#e3effb;
"""
    + _palette(_LIGHT)
    + """}
@media (prefers-color-scheme:dark){:root{
--page:#11151b;--card:#191f27;--text:#e3e8ef;--quiet:#9aa5b4;--edge:#2a323d;--grid:#262e38;
--axis:#4b5665;--done:#6fdcaa;--done-ground:#15352a;--stopped:#f0c66b;--stopped-ground:#3a2f16;
--failed:#ff9c93;--failed-ground:#43211f;--open:#86c1ff;--open-ground:#182f47;
"""
    + _palette(_DARK)
    + """}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:26px;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:17px;margin:36px 0 12px}
h3{font-size:15px;margin:0 0 8px;overflow-wrap:anywhere}
p{margin:6px 0}
.head{display:flex;flex-wrap:wrap;align-items:center;gap:8px 14px}
.head h2{margin:0}
h2~.head,.card~.head,details~.head{margin-top:36px}
.head+.card,.head+p+.card{margin-top:12px}
.quiet{color:var(--quiet)}
.badge{font-size:13px;font-weight:600;padding:2px 11px;border-radius:99px;white-space:nowrap;
color:var(--open);background:var(--open-ground)}
.badge.completed{color:var(--done);background:var(--done-ground)}
.badge.stopped{color:var(--stopped);background:var(--stopped-ground)}
.badge.failed{color:var(--failed);background:var(--failed-ground)}
.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;
margin:22px 0 0}
.tiles .card{padding:12px 16px}
.tiles dt{font-size:13px;color:var(--quiet)}
.tiles dd{margin:0;font-size:21px;font-weight:600;line-height:1.35;white-space:nowrap;
font-variant-numeric:tabular-nums}
.tiles .under{display:block;font-size:12.5px;font-weight:400;white-space:normal;
color:var(--quiet)}
.error{border-color:var(--failed);background:var(--failed-ground);color:var(--failed);
margin-top:18px}
.error pre{margin:0}
.notes{margin:18px 0 0;padding:10px 18px 10px 34px;color:var(--stopped);
background:var(--stopped-ground);border-radius:10px}
.charts{display:grid;gap:16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.charts.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
figure{margin:0;position:relative;overflow-x:auto}
figure>.scales{position:relative}
figure svg{display:block;width:100%;height:auto;min-width:440px;max-width:860px}
.small svg{min-width:280px;max-width:540px}
.levels figure:nth-child(3){grid-column:1/-1}
.levels figure:nth-child(3) svg{max-width:none;min-width:900px}
.over-steps svg{min-width:760px;max-width:none}
.levels+.small{margin-top:16px}
h2+figure.stack{display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
.left-out{font-size:12.5px;color:var(--quiet);margin:4px 0 0}
.missing{margin-top:14px}
.tables{display:grid;gap:16px;align-items:start;grid-template-columns:minmax(0,1fr)}
@media (min-width:1000px){.tables{grid-template-columns:minmax(0,7fr) minmax(0,4fr)}}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px 6px 0;text-align:left;vertical-align:baseline;
border-bottom:1px solid var(--edge)}
tbody tr:last-child>*{border-bottom:0}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:13px;font-weight:500;color:var(--quiet);vertical-align:bottom}
tbody th{font-weight:500;overflow-wrap:break-word}
.wide.number tbody th{min-width:150px}
th:first-child{position:sticky;left:0;background:var(--card)}
td.number{white-space:nowrap}
th.number,td.number{text-align:right}
.run-name{overflow-wrap:anywhere;color:var(--text);font-weight:600}
.matrix th+th,.matrix td{padding:5px 8px;border:0}
.wide.matrix tbody th{min-width:48px;width:1%}
.stack{display:grid;gap:16px;grid-template-columns:minmax(0,1fr)}
td.plain{overflow-wrap:anywhere}
details{margin-top:12px}
details .wide{margin-top:8px}
summary{cursor:pointer;font-weight:500}
summary:focus-visible,.pick:focus-visible+label{outline:2px solid var(--series-0);
outline-offset:2px;border-radius:4px}
pre{margin:12px 0 0;overflow:auto;max-height:560px;white-space:pre-wrap;overflow-wrap:anywhere;
font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.swatch{display:inline-block;width:18px;height:4px;border-radius:2px;vertical-align:middle;
margin-right:8px;background:currentColor}
.pick{position:absolute;opacity:0}
.pick+label{position:absolute;top:0;z-index:1;font-size:12.5px;padding:1px 9px;cursor:pointer;
color:var(--quiet);border:1px solid var(--edge);background:var(--card)}
.pick:checked+label{color:var(--text);background:var(--grid);font-weight:600}
.pick.linear+label{right:44px;width:64px;text-align:center;border-radius:6px 0 0 6px}
.pick.log+label{right:0;width:45px;text-align:center;border-radius:0 6px 6px 0}
.pick.linear:checked~.on-log,.pick.log:checked~.on-linear{display:none}
svg text{font-size:12px;fill:var(--quiet)}
svg .chart-title{font-size:15px;font-weight:600;fill:var(--text)}
svg .entry{fill:var(--text)}
svg .middle,svg .name,svg .empty{text-anchor:middle}
svg .end{text-anchor:end}
svg .tick{font-variant-numeric:tabular-nums}
svg .empty{font-size:14px}
.grid{stroke:var(--grid);fill:none}
.axis{stroke:var(--axis);fill:none}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.small .line{stroke-width:1.5}
.line.thin,.small .line.thin{stroke-width:1.1;stroke-opacity:.7}
.line.again{stroke-dasharray:1 4}
.line.neutral{color:var(--quiet)}
.marks{fill:none;stroke:currentColor;stroke-width:5;stroke-linecap:round}
.small .marks{stroke-width:4}
.band{fill:currentColor;fill-opacity:.08}
.spread{fill:currentColor;fill-opacity:.16;stroke:none}
.spread.thin{fill-opacity:.09}
.level.negative{fill:var(--series-0)}
.level.zero{fill:var(--series-7)}
.level.positive{fill:var(--series-1)}
.before{stroke:var(--text);stroke-width:1.6;fill:none}
.range{display:block;font-size:12.5px;color:var(--quiet)}
.held{fill:currentColor;fill-opacity:.75}
.event{stroke:var(--quiet);stroke-dasharray:2 3;fill:none}
svg .phase{font-size:11px;text-anchor:middle}
.dot{fill:currentColor;stroke:var(--card);stroke-width:1.5}
@media (max-width:640px){main{padding:24px 14px 36px}
.wide.number tbody th{min-width:34vw;max-width:44vw}}
@media print{.card,figure{break-inside:avoid}body{background:none}}
"""
    + "".join(f".s{number}{{color:var(--series-{number})}}" for number in range(len(_LIGHT)))
)
