"""The look of the pages, for light, dark, phone and paper, and of what notebooks show."""

# Colours of both themes. Text has a contrast of at least 4.5 (WCAG AA) on cards, on the page and on
# each shade of a heat map, with `strong` on the darker half; tests compute it. Series s1 to s6 stay
# apart for colour-blind readers. q and e are blues and oranges from least to greatest; d goes from
# orange (negative) over grey to blue.
_LIGHT = """
--page:#f6f5f2;--card:#fff;--ink:#1c1b19;--soft:#5c5a54;--hair:#e2e0da;--level:#ebe9e4;--base:#a9a69e;
--accent:#0b62b4;--s1:#1b74c9;--s2:#c4590f;--s3:#2b9a9a;--s4:#96435f;--s5:#3c14ab;--s6:#2b2e33;
--s0:#c3c0b8;--strong:#fff;--good:#12703c;--poor:#b3261e;--warn:#fdf0e3;--warnline:#c4590f;
--q0:#e8f1fc;--q1:#c8dffa;--q2:#a2cbfa;--q3:#7cb5f5;--q4:#2074c4;--q5:#0268bb;--q6:#035397;--q7:#013e73;
--e0:#fbede6;--e1:#f7d4c3;--e2:#f3b89a;--e3:#ea9b72;--e4:#be560e;--e5:#a44803;--e6:#853900;--e7:#642901;
--d0:#ab4b01;--d1:#e58f62;--d2:#f6c9b3;--d3:#e9ebee;--d4:#b8d8fb;--d5:#6dacf1;--d6:#136dbf;
"""

_DARK = """
--page:#131416;--card:#1c1e21;--ink:#ecebe8;--soft:#a9a7a1;--hair:#34363a;--level:#2b2d31;--base:#6d6f73;
--accent:#7db8f5;--s1:#5ea4ee;--s2:#ee9157;--s3:#f3d94a;--s4:#b1468a;--s5:#d24207;--s6:#f0eee9;
--s0:#55585d;--strong:#101316;--good:#6cc992;--poor:#ff8a80;--warn:#33241a;--warnline:#ee9157;
--q0:#1c2d3f;--q1:#223c59;--q2:#274c74;--q3:#2f5d8e;--q4:#5296df;--q5:#70aff4;--q6:#9ac8fd;--q7:#c8e1fe;
--e0:#3c2519;--e1:#54301d;--e2:#6d3c21;--e3:#854827;--e4:#d17746;--e5:#e89265;--e6:#f5b391;--e7:#fbd5c2;
--d0:#f99864;--d1:#9d562f;--d2:#603f2e;--d3:#34363a;--d4:#324a64;--d5:#34659b;--d6:#7ab9fe;
"""

_SHADES = "".join(
    f".{palette}{i}{{fill:var(--{palette}{i})}}"
    for palette, count in (("q", 8), ("e", 8), ("d", 7))
    for i in range(count)
)

# Series: fills, and strokes for lines and open markers.
_SERIES = "".join(
    f".s{i}{{fill:var(--s{i})}}:is(.line,.whisker,.leader,.open).s{i}{{stroke:var(--s{i})}}"
    for i in range(1, 7)
)

_PAGE = """
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 20px 56px}
"""

# What pages and the cells of notebooks are made of.
_PARTS = """
*{box-sizing:border-box}
h1,h2,h3,p,figure,table,dl,dd,ul{margin:0;padding:0}
h1{font-size:clamp(1.7rem,5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;
overflow-wrap:anywhere;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.3;letter-spacing:-.01em;margin:52px 0 4px}
h3{font-size:1rem;line-height:1.4}
h2+p{color:var(--soft);max-width:72ch;margin-bottom:16px}
code,.path{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.eyebrow{color:var(--soft);font-size:.9rem;margin-bottom:6px}
.against{font-size:1.05rem;color:var(--soft);margin-top:6px;overflow-wrap:anywhere}
.verdict{font-size:1.2rem;line-height:1.5;max-width:66ch;margin:20px 0 28px;text-wrap:pretty}
.gate{margin:-14px 0 26px;font-size:1.05rem}
.gate b{display:inline-block;min-width:1.1em}
.ok,.gate.ok b{color:var(--good)}.bad,.gate.bad{color:var(--poor)}
.card,figure,.tile{background:var(--card);border:1px solid var(--hair);border-radius:10px}
.tiles{display:grid;grid-template-columns:repeat(4,minmax(0,1fr));gap:14px}
.tiles.n5{grid-template-columns:repeat(5,minmax(0,1fr));gap:12px}
.tiles.n6{grid-template-columns:repeat(3,minmax(0,1fr))}
.tile{padding:16px 18px 15px;display:flex;flex-direction:column}
.tile dt{font-size:.9rem;color:var(--soft)}
.tile .big{font-size:2rem;line-height:1.25;font-weight:600;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;white-space:nowrap}
.n5 .tile{padding:14px 14px 13px}.n5 .big{font-size:1.55rem}
.tile .unit{font-size:1rem;font-weight:400;letter-spacing:0;color:var(--soft)}
.tile .note{font-size:.9rem;line-height:1.45;color:var(--soft);margin-top:4px}
.tilenote{font-size:.85rem;color:var(--soft);margin-top:10px}
.better{color:var(--accent);white-space:nowrap}
.card{padding:4px 18px 8px;overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.95rem}
th,td{text-align:left;vertical-align:top;padding:8px 20px 8px 0;border-top:1px solid var(--hair)}
th:last-child,td:last-child{padding-right:0}
thead th{border-top:0;color:var(--soft);font-weight:400;font-size:.85rem}
tbody th{font-weight:400}
tr.lead th,tr.lead .num{font-weight:600}
tr.lead .err,tr.lead .ends{font-weight:400}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.err,.ends,.words{color:var(--soft)}
.words{font-size:.9rem}
tr.block th{padding-top:18px;font-size:.85rem;color:var(--soft);border-top:0}
tr.block:first-child th{padding-top:8px}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px}
figure{padding:16px 18px 14px;min-width:0;display:flex;flex-direction:column;break-inside:avoid}
figcaption{margin-bottom:12px}
figcaption p{font-size:.9rem;line-height:1.45;color:var(--soft);margin-top:3px}
svg{display:block;width:100%;height:auto;max-width:560px;margin:auto auto 0;overflow:visible}
svg.top{margin-top:10px}
text{font-size:13.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
.start{text-anchor:start}.mid{text-anchor:middle}.end{text-anchor:end}
text.ink{fill:var(--ink)}text.hi{fill:var(--strong)}.pass{pointer-events:none}
line.level{stroke:var(--level)}line.base{stroke:var(--base)}
line.mark{stroke:var(--ink);stroke-dasharray:3 3}
.line{fill:none!important;stroke-width:2;stroke-linejoin:round}
.s0{fill:var(--s0)}
.m{stroke:var(--card)}.m.open{fill:var(--card);stroke-width:2}.m.hidden{fill-opacity:0;stroke:none}
.dash{stroke-dasharray:7 4}
.line.front{stroke:var(--base);stroke-width:1.5;stroke-dasharray:2 4}
.whisker{stroke-width:2}.leader{stroke-width:1}
.halo{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.key{display:inline-block;width:16px;height:16px;margin:0 8px 0 0;vertical-align:-2px}
.run{display:flex;min-width:7em;overflow-wrap:anywhere}.run .key{flex:none;margin-top:4px}
.runs thead th{white-space:normal;vertical-align:bottom}
.runs td:not(.num){white-space:nowrap}
.runs thead .better{font-size:.85rem}
.runs .ends{font-size:.8rem}
.runs th,.runs td{padding-right:14px}
.runs b{font-weight:600}
circle{stroke:var(--card);stroke-width:1.5}circle.fine{stroke:none}
.c{stroke:var(--card);stroke-width:1}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7}.soft{color:var(--soft)}
.said tr:first-child>*{border-top:0}.said th{width:7.5em;overflow-wrap:anywhere}
mark{background:var(--warn);color:inherit;border-bottom:2px solid var(--warnline)}
details{margin-top:14px}
summary{cursor:pointer;color:var(--accent);padding:6px 0}
details td,details tbody th{white-space:nowrap}
details thead .num{white-space:normal}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:7px 22px;
padding:14px 0 10px}
.facts dt{color:var(--soft)}
.facts dd{overflow-wrap:anywhere}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin-top:22px;font-size:.95rem}
a{color:var(--accent)}
.warn{background:var(--warn);border-left:4px solid var(--warnline);border-radius:0 10px 10px 0;
padding:14px 18px;margin-top:14px}
.warn details{margin-top:2px}.warn+.tiles{margin-top:22px}
.warn ul{padding-left:20px;margin-top:6px}
.warn li{overflow-wrap:anywhere}
footer{margin-top:44px;padding-top:14px;border-top:1px solid var(--hair);color:var(--soft);
font-size:.9rem;max-width:none}
"""

_MEDIA = """
@media screen and (max-width:760px){
main{padding:24px 16px 40px}
.grid{grid-template-columns:minmax(0,1fr)}
.tiles,.tiles.n5,.tiles.n6{grid-template-columns:repeat(2,minmax(0,1fr));gap:10px}
.tile:last-child:nth-child(odd){grid-column:1/-1}
.tile{padding:12px 13px}.tile .big,.n5 .big{font-size:1.4rem;white-space:normal}
.tile .unit{font-size:.9rem}.tile .note{font-size:.8rem}
text{font-size:15.5px}text.pass{font-size:13.5px}
figure{padding:14px 12px 12px}
.card{padding:4px 14px 8px}
.verdict{font-size:1.08rem}
.metrics thead{display:none}
.metrics tr{display:grid;grid-template-columns:auto auto minmax(0,1fr);column-gap:8px;
padding:9px 0;border-top:1px solid var(--hair)}
.metrics th,.metrics td{border:0;padding:0}
.metrics .err:not(:empty)::before{content:"± "}
.metrics tr>th{grid-column:1/-1}
.metrics .num{text-align:left}
.metrics .num:not(.err,.ends){font-size:1.05rem}
.metrics .ends{grid-row:3;grid-column:1/-1;font-size:.9rem}
.metrics .ends:empty{display:none}
.metrics .ends:not(:empty)::before{content:"95 % interval "}
.metrics .words{grid-column:1/-1}
.metrics .better{text-align:right}
.metrics tr.block{border-top:0;padding:14px 0 2px}
.metrics tr.block:first-child{padding-top:2px}
.runs thead{display:none}
.runs tr{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:8px 14px;padding:12px 0;
border-top:1px solid var(--hair)}
.runs tr:first-child{border-top:0}
.runs th,.runs td,.runs .num{border:0;padding:0;text-align:left;white-space:normal}
.runs th{grid-column:1/-1;font-size:1.05rem;font-weight:600;overflow-wrap:anywhere}
.runs td::before{content:attr(data-label);display:block;font-size:.85rem;color:var(--soft)}
.facts{grid-template-columns:minmax(0,1fr);gap:0}
.facts dd{margin-bottom:9px}
}
@media print{
@page{margin:14mm}
:root{--page:#fff;font-size:11.5px}
body{font-size:1rem}
th,td{padding-top:4px;padding-bottom:4px}
main{max-width:none;padding:0}
h2{margin-top:26px;break-after:avoid}
h2+p,tr.block{break-after:avoid}tr{break-inside:avoid}
.tiles{grid-template-columns:repeat(4,minmax(0,1fr))}
.tile .big{font-size:1.35rem}
.grid{display:block}
.grid figure{display:inline-block;width:49%;margin:0 .4% 8px 0;vertical-align:top}
.tile,.warn{break-inside:avoid}
.card{border:0;padding:0}
.c,rect,circle,.warn{-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}
nav{display:none}
summary{break-after:avoid;list-style:none;color:var(--soft)}
}
"""

CSS = (
    f":root{{{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"{_SERIES}{_PAGE}{_PARTS}{_MEDIA}{_SHADES}"
).replace("\n", "")

# A cell shares its page with the notebook, whose theme is not that of the system: these are dark
# Jupyter, dark VS Code, dark Colab.
_DARK_NOTEBOOKS = (
    '[data-jp-theme-light="false"] .grokquant,.vscode-dark .grokquant,[theme=dark] .grokquant'
)
# Notebooks set text smaller than pages, shade every second row and align cells to the right. The
# class is said twice below, so that it counts for more than theirs.
_CELL = """
color:var(--ink);background:var(--card);border-radius:8px;
width:fit-content;max-width:880px;padding:8px 14px;
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
.card,figure{border:0;padding:0;margin:0}
figure{width:560px;max-width:100%}
h2,h3{font-size:1.05em;font-weight:600;margin:0}
h2+p{margin:2px 0 6px}
section{margin-top:12px}
table{table-layout:auto;width:auto;margin:4px 0;font-size:1em}
th,td{font-size:1em}
tr{background:none!important}
.verdict,.gate{margin:4px 0;font-size:1em;max-width:none}
.note{color:var(--soft);margin:4px 0}
.facts{padding:4px 0}.facts dt,.facts dd{width:auto;float:none;margin:0;font-weight:400}
"""

CELL_CSS = (
    f".grokquant{{{_LIGHT}}}{_DARK_NOTEBOOKS}{{{_DARK}}}"
    f".grokquant.grokquant{{{_SERIES}{_PARTS}{_SHADES}{_CELL}}}"
).replace("\n", "")
