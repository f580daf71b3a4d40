"""The page's style sheet: light and dark, wide and narrow, screen and paper. The figures take their colours from it."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--surface:#fff;--ink:#1b2027;--muted:#5b6572;--grid:#dfe3e8;--line:#e2e6eb;
--accent:#1f5fc4;--alarm:#c02a3d;--alarm-soft:#fdecee;--good:#18794e;
--series-0:#2563c9;--series-1:#bf5408;--series-2:#18794e;--series-3:#8e3fb8;
--series-4:#b3307e;--series-5:#0b7285;--series-6:#7a5a1e;--series-7:#66717e}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--surface:#1c2026;--ink:#e8ebef;--muted:#a2acb8;--grid:#333a43;
--line:#2d333b;--accent:#86b4fb;--alarm:#ff8a96;--alarm-soft:#3a2126;--good:#63cf9d;
--series-0:#7db1fb;--series-1:#f2a35f;--series-2:#63cf9d;--series-3:#d19cf1;
--series-4:#f28cc4;--series-5:#62cfe0;--series-6:#d9b873;--series-7:#a2acb8}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main,header,footer,nav{max-width:1120px;margin:0 auto;padding:0 20px}
header{padding-top:44px}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.15;margin:0 0 .5em;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.35rem;margin:2.4em 0 .4em;letter-spacing:-.01em}
h3{font-size:1.05rem;margin:1.6em 0 .3em;overflow-wrap:anywhere}
p{margin:.5em 0 .9em;max-width:72ch;overflow-wrap:anywhere}
.lead{font-size:1.1rem;max-width:68ch}
.small,.note,figcaption,footer{color:var(--muted);font-size:.9rem}
a{color:var(--accent)}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;padding:0;margin:1.2em 0 0;font-size:.95rem}
code{font:0.9em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:12px 14px;overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:1.4em 0 0;padding:0}
.tile{background:var(--surface);border:1px solid var(--line);border-radius:12px;padding:14px 16px;margin:0}
.tile dt{color:var(--muted);font-size:.88rem}
.tile dd{margin:0}
.tile .big{font-size:1.75rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;overflow-wrap:anywhere}
.tile .small{line-height:1.4;overflow-wrap:anywhere}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;align-items:start;
margin:1em 0}
.figures.packed{display:block;columns:2 440px;column-gap:16px}
.figures.packed figure{break-inside:avoid;margin-bottom:16px}
figure{background:var(--surface);border:1px solid var(--line);border-radius:12px;padding:14px 14px 10px;margin:0}
figure h3{margin:0 0 .3em}
figure svg{display:block;width:100%;max-width:620px;height:auto;margin:0 auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
figure.wide{margin:1em 0}
figure.wide .across{overflow-x:auto}
figure.wide svg{max-width:none;min-width:620px}
figure.wide svg text{paint-order:stroke;stroke:var(--surface);stroke-width:2.5px;stroke-linejoin:round}
figcaption{margin-top:.5em;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:.1em 0 .5em;font-size:.92rem}
.swatch{overflow-wrap:anywhere}
.swatch i{font-style:normal;font-size:.8em}
.series-0 i{color:var(--series-0)}.series-1 i{color:var(--series-1)}.series-2 i{color:var(--series-2)}
.series-3 i{color:var(--series-3)}.series-4 i{color:var(--series-4)}.series-5 i{color:var(--series-5)}
.series-6 i{color:var(--series-6)}.series-7 i{color:var(--series-7)}
.alarm-mark i{color:var(--alarm)}
ol.points{columns:2;column-gap:24px;padding-left:0;list-style:none;margin:.4em 0 0;font-size:.92rem}
ol.points li{break-inside:avoid;padding:1px 0;overflow-wrap:anywhere}
.callout{border-left:4px solid var(--muted);background:var(--surface);border-radius:0 10px 10px 0;padding:10px 16px;
margin:1em 0}
.callout.alarm{border-color:var(--alarm);background:var(--alarm-soft)}
ul.plain{padding-left:1.2em;margin:.4em 0 1em;max-width:76ch}
ul.plain li{margin:.25em 0;overflow-wrap:anywhere}
.callout ul.plain{margin:.2em 0}
.tag{display:inline-block;border-radius:5px;padding:0 .45em;font-size:.78rem;font-weight:650;letter-spacing:.03em;
border:1px solid currentColor;color:var(--muted);white-space:nowrap}
.tag.alarm{background:var(--alarm);border-color:var(--alarm);color:var(--surface)}
.tag.good{color:var(--good)}
.scroll{overflow-x:auto;background:var(--surface);border:1px solid var(--line);border-radius:12px;margin:1em 0}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;padding:12px 14px 8px;color:var(--muted);font-size:.9rem}
th,td{padding:7px 8px;text-align:left;vertical-align:top;border-top:1px solid var(--line);overflow-wrap:break-word}
td code{white-space:nowrap}
thead th,thead th.number{font-size:.82rem;color:var(--muted);font-weight:600;vertical-align:bottom;overflow-wrap:normal;
white-space:normal}
tbody th{font-weight:600;min-width:10em}
th:first-child,td:first-child{padding-left:14px}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts tbody th{width:9.5em;min-width:0;overflow-wrap:normal}
h4{font-size:1rem;margin:1.4em 0 .3em}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(112px,1fr));gap:12px;margin:.8em 0 1.4em}
figure.mistake{padding:8px;border-radius:10px}
figure.mistake img{display:block;width:100%;height:auto;border-radius:6px}
figure.mistake figcaption{font-size:.8rem;line-height:1.35;margin-top:.4em}
figure.mistake span{display:block;overflow-wrap:anywhere}
.wrong{color:var(--alarm);font-weight:600}
.label{color:var(--ink)}
.file{font-size:.72rem}
details{margin:1em 0}
summary{cursor:pointer;color:var(--accent)}
footer{padding-top:2em;padding-bottom:3em}
@media (max-width:680px){
main,header,footer,nav{padding:0 14px}
header{padding-top:26px}
h2{margin-top:1.9em}
figure{padding:12px 8px 8px}
figure h3,figcaption,.legend,ol.points{padding:0 4px}
ol.points{columns:1}
.tiles{grid-template-columns:1fr 1fr;gap:10px}
.tile{padding:10px 12px}
.tile .big{font-size:1.35rem}
table:not(.facts),table:not(.facts) tbody,table:not(.facts) tr,table:not(.facts) th,table:not(.facts) td,
table:not(.facts) caption{display:block;width:auto}
table:not(.facts) thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table:not(.facts) th,table td{overflow-wrap:anywhere}
table:not(.facts) tr{border-top:1px solid var(--line);padding:8px 14px}
table:not(.facts) tbody th{border:0;padding:2px 0 4px}
table:not(.facts) td,table:not(.facts) td.number{border:0;padding:1px 0;display:flex;justify-content:space-between;
gap:14px;text-align:right;white-space:normal}
table:not(.facts) td::before{content:attr(data-label);color:var(--muted);text-align:left;flex:0 0 auto}
}
@media print{body{background:#fff}figure,.scroll,.tile{break-inside:avoid}nav{display:none}}
"""
