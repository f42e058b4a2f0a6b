"""What all pages look like: one style sheet, and a script that adds comfort and is needed by nobody.

Colors are custom properties with one value per scheme. Text has a contrast of at least 4.5 to what it stands on, lines
of figures at least 3, in both schemes; series differ in color, dash and marker, so that no one depends on color. The
hues are Okabe and Ito's, which people of any color vision tell apart, darkened or lightened to that contrast.
tests/report/test_style.py computes both.
"""

from __future__ import annotations

__all__ = ["COLORS", "SCRIPT", "STYLE"]

COLORS = 7
"""Colors of series in figures, ``--c0`` and so on."""

_LIGHT = """\
--bg:#ffffff;--panel:#f3f5f7;--line:#d3d8de;--text:#1b1f24;--muted:#545e69;--accent:#0a58a8;--blank:#e3e7eb;
--c0:#0067a5;--c1:#b8500c;--c2:#00785a;--c3:#a3427c;--c4:#806600;--c5:#2a7fae;--c6:#545b63;"""
_DARK = """\
--bg:#14171a;--panel:#1f2429;--line:#3a424a;--text:#e7eaed;--muted:#a9b3bd;--accent:#84bcff;--blank:#2a3036;
--c0:#56b4e9;--c1:#f08a4b;--c2:#2fc29a;--c3:#e694c9;--c4:#e3c53d;--c5:#9ecbff;--c6:#b8c0c8;"""

STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    """\
*{box-sizing:border-box}
html{scroll-padding-top:1rem}
body{margin:0 auto;max-width:96rem;padding:0 1rem 3rem;background:var(--bg);color:var(--text);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.1rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;line-height:1.3;margin:2.4rem 0 .8rem;padding-top:.7rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .5rem;overflow-wrap:anywhere}
p{margin:.5rem 0;max-width:46rem;overflow-wrap:anywhere}
a{color:var(--accent)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.skip{position:absolute;left:-100rem}
.skip:focus{left:1rem;top:.5rem;background:var(--bg);padding:.5rem 1rem;z-index:3}
header{padding-top:1.5rem}
.kind{margin:0;color:var(--muted)}
.muted,figcaption,caption,dt,footer,summary{color:var(--muted)}
footer{margin-top:3rem;padding-top:.7rem;border-top:1px solid var(--line)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:.8rem 0 0;padding:0}
nav a{display:inline-block;padding:.2rem 0}
main{min-width:0}
main:focus{outline:none}
section:first-child h2{border-top:0;margin-top:1rem}
@media (min-width:75rem){
.frame{display:grid;grid-template-columns:12rem minmax(0,1fr);gap:3rem}
nav{position:sticky;top:0;align-self:start;max-height:100vh;overflow-y:auto;padding:1rem 0}
nav ul{flex-direction:column}}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.7rem;margin:1rem 0;max-width:72rem}
.tiles div{background:var(--panel);border-radius:.4rem;padding:.6rem .8rem}
.tiles dt{font-size:.9rem;line-height:1.35}
.tiles dd{margin:.1rem 0 0;font-size:1.25rem;line-height:1.3;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.facts{display:grid;grid-template-columns:minmax(7rem,max-content) minmax(0,1fr);gap:.25rem 1.5rem;margin:1rem 0}
.facts dd{margin:0;overflow-wrap:anywhere;unicode-bidi:isolate}
.scroll{overflow-x:auto;margin:1rem 0;max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0 .4rem}
caption span{position:sticky;left:0;display:inline-block;width:max-content;
max-width:min(46rem,calc(100vw - 2rem))}
td,th{border-bottom:1px solid var(--line);padding:.35rem .8rem;text-align:left;vertical-align:top;
font-weight:normal;unicode-bidi:isolate}
thead th{font-weight:600;vertical-align:bottom}
tbody th,td.words{min-width:10rem;max-width:26rem;overflow-wrap:anywhere}
tbody th{position:sticky;left:0;background:var(--bg)}
tr>:first-child{padding-left:0}
@media (max-width:40rem){td,th{padding:.35rem .5rem}tbody th{min-width:8rem;max-width:42vw}
.facts{grid-template-columns:minmax(0,1fr)}.facts dd{margin-bottom:.4rem}}
.num{text-align:right;white-space:nowrap}
th.num{white-space:normal}
tbody tr:hover>*{background:var(--panel)}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;text-align:inherit;cursor:pointer;
text-decoration:underline dotted;text-underline-offset:.2em}
th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
pre{background:var(--panel);border-radius:.4rem;padding:.8rem 1rem;margin:.6rem 0;overflow:auto;max-height:36rem;
font:.875rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;tab-size:4}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.block{position:relative}
.block.live pre{padding-top:2.6rem}
.block>button{position:absolute;right:.5rem;top:.5rem;font:inherit;font-size:.875rem;padding:.15rem .7rem;
color:var(--text);background:var(--bg);border:1px solid var(--muted);border-radius:.3rem;cursor:pointer}
details{margin:.5rem 0}
summary{cursor:pointer;width:fit-content;max-width:100%;overflow-wrap:anywhere}
figure{margin:0;min-width:0}
figcaption{font-size:.9rem;line-height:1.4;overflow-wrap:anywhere;unicode-bidi:isolate}
figcaption ul{margin:.2rem 0 0;padding-left:1.1rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1.6rem 2rem;margin:1rem 0}
.chart{max-width:34rem}
.chart figcaption{color:var(--text)}
.chart strong{font-weight:600}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--muted);font-family:inherit}
.axis,.grid{stroke:var(--line);fill:none}
.axis{stroke:var(--muted)}
.curve,.dots,.key{fill:none;stroke-width:2;stroke-linejoin:round}
.dots{stroke-width:5}
.sign{stroke-width:1.5}
.band{stroke:none;opacity:.18}
.faint{stroke:var(--muted);stroke-width:1;opacity:.45;fill:none}
.keys{list-style:none;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;margin:.4rem 0;padding:0;font-size:.9rem}
.keys li{display:flex;align-items:center;gap:.45rem;min-width:0;overflow-wrap:anywhere;unicode-bidi:isolate}
.keys svg{flex:none;width:34px;height:12px}
.keys i{flex:none;width:1rem;height:1rem;border:1px solid var(--muted);border-radius:.15rem}
.spans{list-style:none;margin:1rem 0;padding:0;max-width:72rem}
.spans li{display:grid;grid-template-columns:minmax(0,1fr) max-content;gap:0 1rem;padding:.3rem 0;
border-bottom:1px solid var(--line);align-items:center}
.spans .name{overflow-wrap:anywhere;unicode-bidi:isolate}
.spans .value{font-variant-numeric:tabular-nums;text-align:right}
.spans svg{grid-column:1/-1;height:22px;margin-top:.1rem}
.spans .scale{border:0;padding:0}
@media (min-width:50rem){.spans li{grid-template-columns:minmax(0,18rem) minmax(0,1fr) 8.5rem}
.spans svg{grid-column:2;grid-row:1}.spans .value{grid-column:3}}
.pictures,.set{display:flex;flex-wrap:wrap;gap:.8rem;margin:.5rem 0}
.sets{display:flex;flex-wrap:wrap;gap:.3rem 2.2rem}
.pictures figure,.set figure{width:10.5rem}
.pictures.wide figure{width:20rem;max-width:100%}
img{display:block;width:100%;height:auto;image-rendering:pixelated;background:var(--blank)}
@media (forced-colors:active){.curve,.dots,.key,.sign{forced-color-adjust:none}}
@media print{
body{max-width:none;font-size:10pt}
nav,.skip,.block>button{display:none}
.frame{display:block}
.scroll,pre{overflow:visible;max-height:none}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
tbody th{position:static}
figure,tr,.tiles div{break-inside:avoid}
h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}}
"""
)

# Buttons are made here: a page without scripts has none that would do nothing.
SCRIPT = """\
(()=>{"use strict";
const worth=cell=>{const said=cell.textContent.trim().replaceAll(",","");
const number=parseFloat(said);return Number.isNaN(number)?said.toLowerCase():number};
const before=(a,b)=>typeof a===typeof b?(a<b?-1:a>b?1:0):typeof a==="number"?-1:1;
for(const table of document.querySelectorAll("table.sortable")){
const heads=[...table.tHead.rows[0].cells];
heads.forEach((head,column)=>{
if(!head.textContent.trim())return;
const button=document.createElement("button");button.type="button";
button.append(...head.childNodes);head.append(button);
button.addEventListener("click",()=>{
const first=head.classList.contains("num")?"descending":"ascending";
const other=first==="ascending"?"descending":"ascending";
const order=head.getAttribute("aria-sort")===first?other:first;
heads.forEach(each=>each.removeAttribute("aria-sort"));head.setAttribute("aria-sort",order);
const sign=order==="ascending"?1:-1;
const rows=[...table.tBodies[0].rows].map(row=>[worth(row.cells[column]),row]);
rows.sort(([a],[b])=>typeof a===typeof b?sign*before(a,b):before(a,b));
table.tBodies[0].append(...rows.map(([,row])=>row))})})}
for(const block of document.querySelectorAll(".block")){
const text=block.querySelector("pre");
const button=document.createElement("button");button.type="button";button.textContent="Copy";
button.setAttribute("aria-label","Copy "+text.getAttribute("aria-label"));
button.addEventListener("click",async()=>{
try{await navigator.clipboard.writeText(text.textContent);button.textContent="Copied"}
catch{getSelection().selectAllChildren(text);button.textContent="Selected"}
setTimeout(()=>{button.textContent="Copy"},2000)});
block.append(button);block.classList.add("live")}
})();
"""
