"""How the page of :mod:`.page` looks: on a laptop and on a phone, in light and in dark."""

from __future__ import annotations

__all__ = ["STYLE"]

# Okabe and Ito's colours, told apart with every common form of colour blindness; lighter ones on dark ground.
STYLE = """
:root{--ink:#1f2328;--soft:#5b636d;--line:#d9dde2;--ground:#fff;--raised:#f6f8fa;
--c0:#0072b2;--c1:#c04f00;--c2:#007f5c;--c3:#b0558b;--c4:#a06a00;--c5:#2a7fb0}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa4af;--line:#343b44;--ground:#14171a;--raised:#1d2227;
--c0:#56b4e9;--c1:#ff9350;--c2:#3fd0a4;--c3:#e79cc5;--c4:#f0b840;--c5:#9ad0f5}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:.4em 0 .6em}
h2{font-size:1.2rem;margin:2.2em 0 .6em}
h3{font-size:1rem;font-weight:400;margin:1.4em 0 .4em}
p,dd,li{max-width:76ch}
small{color:var(--soft);font-size:.85em}
.legend{list-style:none;margin:0 0 1em;padding:0;display:flex;flex-wrap:wrap;gap:6px 22px}
.chip{overflow-wrap:anywhere}
.chip i{display:inline-block;width:1.1em;height:.28em;margin-right:.5em;vertical-align:middle;background:currentColor;
border-radius:2px}
.chip{color:var(--ink)}
.chip.c0 i,.chip.c0 b,b.c0{color:var(--c0)}.chip.c1 i,.chip.c1 b,b.c1{color:var(--c1)}
.chip.c2 i,.chip.c2 b,b.c2{color:var(--c2)}.chip.c3 i,.chip.c3 b,b.c3{color:var(--c3)}
.chip.c4 i,.chip.c4 b,b.c4{color:var(--c4)}.chip.c5 i,.chip.c5 b,b.c5{color:var(--c5)}
.wide{overflow-x:auto;margin:0 -20px;padding:0 20px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.95rem;min-width:min(100%,560px)}
th,td{padding:6px 18px 6px 0;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child{text-align:left;font-weight:400}
thead th{color:var(--soft);font-weight:600;font-size:.85rem;vertical-align:bottom}
td:last-child,th:last-child{padding-right:0}
td small{display:inline-block;margin-left:.35em}
td,tbody th{white-space:nowrap}tbody th.label{white-space:normal;min-width:9em}
.words td{text-align:left;white-space:normal;min-width:9em}.words thead th{text-align:left}
.events td{text-align:left;white-space:nowrap}.events td:last-child{white-space:normal;min-width:12em}
.events tbody th.label,.trades tbody th.label{min-width:0}
.events thead th{text-align:left}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:14px}
figure{margin:0;padding:10px 10px 4px;border:1px solid var(--line);border-radius:8px;background:var(--raised)}
figcaption{font-size:.9rem;font-weight:600;margin-bottom:2px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:13px}
.mark path{stroke:currentColor;stroke-width:1.2;stroke-dasharray:2 3;opacity:.6;fill:none}
.mark path+path{stroke-width:10;stroke-dasharray:none;opacity:0}
.mark:hover path{opacity:1}.mark:hover path+path{opacity:0}
.grid{stroke:var(--line);stroke-width:1}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.line.c1{stroke-dasharray:7 2.5}.line.c2{stroke-dasharray:10 3 2 3}.line.c3{stroke-dasharray:3 2.5}
svg .c0{color:var(--c0)}svg .c1{color:var(--c1)}svg .c2{color:var(--c2)}
svg .c3{color:var(--c3)}svg .c4{color:var(--c4)}svg .c5{color:var(--c5)}
circle{fill:transparent}circle:hover{fill:currentColor}
.bar{margin:0 0 16px;max-width:860px}
.bar p{margin:0 0 4px}
.bar div{display:flex;height:26px;background:var(--raised);border-radius:5px;overflow:hidden}
.bar div i{display:block;height:100%;border-right:1px solid var(--ground)}
.s0{background:var(--soft)}.s1{background:var(--c2)}.s2{background:var(--c3)}.s3{background:var(--c4)}
.s4{background:var(--c5)}.s5{background:var(--c1)}
.keys{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.85rem;color:var(--soft);padding-top:4px}
.keys i{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em}
dl{margin:1em 0}dt{font-weight:600;margin-top:.7em}dd{margin:0}
dd small{display:block}
details{margin-top:1.6em}summary{cursor:pointer;font-weight:600}
@media (max-width:560px){main{padding:14px 16px 48px}.wide{margin:0 -16px;padding:0 16px}
h1{font-size:1.4rem}th,td{padding-right:10px}table{font-size:.88rem}td small{display:block;margin-left:0}}
@media print{.charts{grid-template-columns:1fr 1fr}details{display:block}}
"""
