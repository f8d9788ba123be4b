"""The report's style sheet and script, and the Content-Security-Policy that allows exactly these two.

The look is a darkroom's: neutral paper in light mode, a dark room in dark mode, and the red and amber of a safelight.
The page is complete without JavaScript; the script shows values on the loss graph and enlarges pictures.
"""

import base64
import hashlib

CSS = """
:root{color-scheme:light dark;--paper:#faf9f7;--surface:#fff;--ink:#1f1b19;--muted:#6b625d;--line:#e3ded9;
--grid:#ebe7e2;--faint:#d6cfc9;--accent:#b8281b;--amber:#b8740a;--wash:#f6ece9;--code:#f3f0ec}
@media (prefers-color-scheme:dark){:root{--paper:#131010;--surface:#1b1716;--ink:#efe8e3;--muted:#a89c95;
--line:#352d2a;--grid:#2a2321;--faint:#4b413c;--accent:#ff5d47;--amber:#f0a63c;--wash:#2a1816;--code:#221c1a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,header,footer{max-width:1128px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1,h2,h3{line-height:1.2;font-weight:650;letter-spacing:-.012em;text-wrap:balance}
h1{font-size:clamp(1.8rem,1.2rem + 2.6vw,2.7rem);margin:.35rem 0 .4rem}
h2{font-size:1.5rem;margin:0 0 .4rem}
h3{font-size:1rem;margin:1.6rem 0 .5rem;letter-spacing:0}
p{margin:.5rem 0;max-width:72ch}
section{padding:38px 0 0;border-top:1px solid var(--line);margin-top:40px}
a{color:inherit;text-decoration-color:var(--accent);text-underline-offset:3px}
a:focus-visible,summary:focus-visible,button:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);
outline-offset:2px}
.mark{display:flex;align-items:center;gap:.55rem;font-size:.85rem;color:var(--muted);letter-spacing:.02em}
.mark svg{width:14px;height:14px}
.sub,.note,.meta,figcaption,.empty,.legend{color:var(--muted)}
.sub{font-size:1.02rem;margin:0}
.lead{font-size:1.14rem;line-height:1.5;margin:1.1rem 0 0}
.note,.meta,figcaption,.legend{font-size:.875rem;line-height:1.45}
.empty{border:1px dashed var(--line);border-radius:8px;padding:14px 16px;max-width:none}
.alert{background:var(--wash);border-left:4px solid var(--accent);border-radius:0 8px 8px 0;padding:12px 16px;
max-width:none}
.lead+.alert,.alert+.alert{margin-top:1.2rem}
.alert p,.alert ul{margin:.2rem 0 0}
.grave{border:2px solid var(--accent);border-left-width:12px;border-radius:8px;margin:1.4rem 0 0}
.grave strong{font-size:1.2rem;line-height:1.3;color:var(--accent)}
.grave p{max-width:none}
nav{margin:1.4rem 0 0;font-size:.9rem;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem}
nav a{color:var(--muted);padding:.15rem 0}
.tiles{display:flex;flex-wrap:wrap;gap:1px;margin:1.8rem 0 0;background:var(--line);
border:1px solid var(--line);border-radius:10px;overflow:hidden}
.tiles div{background:var(--surface);padding:15px 18px 14px;flex:1 1 220px}
@media (min-width:1000px){.tiles{display:grid;grid-template-columns:repeat(4,1fr)}.of-1{grid-template-columns:1fr}
.of-2{grid-template-columns:repeat(2,1fr)}.of-3,.of-6{grid-template-columns:repeat(3,1fr)}
.of-5{grid-template-columns:repeat(5,1fr)}.of-7 div:last-child{grid-column:span 2}}
.tiles dt{font-size:.8rem;color:var(--muted)}
.tiles dd{margin:0}
.tiles .value{font-size:1.55rem;font-weight:620;letter-spacing:-.015em;line-height:1.25;white-space:nowrap}
.tiles .value small{font-size:.92rem;font-weight:450;color:var(--muted);letter-spacing:0}
.prompt,td,th,dd,dt,pre,li,figcaption{unicode-bidi:isolate}
.prompt{font-family:ui-serif,Georgia,"Times New Roman",serif;font-style:italic;font-size:1.07em}
.large>.pair>figcaption{font-size:1rem}
img{display:block;max-width:100%;height:auto;background:var(--grid);border-radius:4px}
img.tiny{image-rendering:pixelated}
.missing{display:grid;place-items:center;min-height:92px;height:100%;border:1px dashed var(--line);border-radius:4px;
color:var(--muted);font-size:.75rem;text-align:center;padding:6px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:32px 28px;
margin:1.4rem 0 0}
.pair{margin:0}
.pairs.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.pairs.large{grid-template-columns:1fr;gap:36px}
.large .pair{display:grid;grid-template-columns:minmax(0,780px) minmax(180px,1fr);gap:24px;align-items:end}
.pair .two{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.pair .two figure{margin:0}
.pair .two img{width:100%}
.pair .two figcaption{font-size:.8rem;padding:0 0 4px}
.pair .two figure+figure figcaption{color:var(--accent)}
.pair>figcaption{margin-top:8px;color:var(--ink)}
.scroll{overflow-x:auto;margin:1rem 0;-webkit-overflow-scrolling:touch}
.strip{border-collapse:collapse;margin:0;min-width:100%}
.strip th{font-weight:450;text-align:left;padding:0}
.strip thead th{font-size:.8rem;color:var(--muted);padding-bottom:2px;white-space:nowrap}
.strip thead th.best{color:var(--accent);font-weight:600}
.strip td,.strip thead th{padding-right:5px}
.strip td{min-width:118px;width:8.3%}
.strip td img{width:100%;max-width:260px}
.strip .prompt-row{display:block;position:sticky;left:0;width:max-content;max-width:min(1040px,calc(100vw - 56px));
padding:18px 0 6px;font-size:.95rem;line-height:1.35}
.strip tbody tr:first-child .prompt-row{padding-top:8px}
.graphs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:26px 36px;margin-top:1rem}
.graphs figure{margin:0}
figure.wide{margin:1rem 0 0;position:relative}
svg.graph{display:block;width:100%;height:auto;font-family:inherit;overflow:visible;touch-action:pan-y}
svg.graph text{paint-order:stroke;stroke:var(--paper);stroke-width:3px;stroke-linejoin:round}
svg.narrow{display:none;max-width:520px;margin:0 auto}
figure.wide>figcaption,.graph+.note{margin-top:.5rem}
.f-ink{fill:var(--ink)}.f-muted{fill:var(--muted)}.f-grid{fill:var(--grid)}.f-accent{fill:var(--accent)}
.f-amber{fill:var(--amber)}.f-faint{fill:var(--faint)}.f-surface{fill:var(--surface)}
.s-ink{stroke:var(--ink)}.s-muted{stroke:var(--muted)}.s-grid{stroke:var(--grid)}.s-accent{stroke:var(--accent)}
.s-amber{stroke:var(--amber)}.s-faint{stroke:var(--faint)}.s-surface{stroke:var(--surface)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;margin:.4rem 0 .7rem;padding:0}
.legend li{display:flex;align-items:center;gap:.45rem}
.legend svg{width:24px;height:10px;flex:none}
.readout{min-height:1.45em;font-size:.875rem;color:var(--muted);display:block;margin:.5rem 0 .3rem}
.readout span{color:var(--ink);margin-right:1.6em}
table{border-collapse:collapse;font-size:.9rem}
.scroll>table:not(.strip){min-width:min(100%,520px)}
th,td{text-align:left;vertical-align:top}
table:not(.strip) th,table:not(.strip) td{padding:7px 18px 7px 0;border-bottom:1px solid var(--line)}
table:not(.strip) thead th{font-size:.8rem;font-weight:500;color:var(--muted);white-space:nowrap}
table:not(.strip) tbody th{font-weight:500}
.scores svg{display:block;width:220px;height:50px;min-width:150px}
.scores .side{display:none}
.scores td,.scores th{min-width:9rem}
.scores td.nowrap{white-space:nowrap;min-width:0}
.nowrap{white-space:nowrap}
.figures th,.figures td{white-space:nowrap}
.figures td,.figures thead th:not(:first-child){text-align:right}
.figures.of-class td:nth-child(2),.figures.of-class th:nth-child(2),.figures.barred td:last-child{text-align:left}
.figures svg{display:inline-block;vertical-align:middle}
.chart svg.graph{width:1080px;max-width:none}
.buckets{display:grid;grid-template-columns:auto auto 1fr auto;gap:7px 14px;align-items:center;font-size:.875rem;
margin:.6rem 0;max-width:640px}
.buckets .shape{width:38px;height:38px;display:block}
.buckets .bar{width:100%;height:12px;display:block}
.buckets .count{text-align:right;color:var(--muted);white-space:nowrap}
.examples{columns:4 220px;column-gap:20px;margin-top:.8rem}
.examples figure{margin:0 0 20px;break-inside:avoid}
.examples img{width:100%}
.examples figcaption{margin-top:6px}
.settings{columns:2 340px;column-gap:44px}
.settings section{border:0;margin:0;padding:6px 0 14px;break-inside:avoid}
.settings h3{margin:0 0 .3rem;font:600 .9rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
color:var(--accent)}
.rows{margin:0;font-size:.9rem}
.rows div{display:grid;grid-template-columns:minmax(120px,42%) 1fr;gap:14px;padding:4px 0;
border-bottom:1px solid var(--line)}
.rows dt{color:var(--muted)}
.rows dd{margin:0;white-space:pre-line}
.settings dt{font:.82rem/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.plain dt{font:inherit}
pre,code{font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--code);border-radius:8px;padding:14px 16px;margin:.7rem 0;white-space:pre-wrap}
.figures.compared thead th{white-space:normal;vertical-align:bottom}.compared th{overflow-wrap:normal}
.choice{margin:1rem 0 0}.choice p{margin:0}.choice pre{margin:.25rem 0 0;user-select:all}
.tried{display:grid;grid-template-columns:minmax(0,400px) minmax(0,1fr);gap:28px;margin:1.6rem 0 0;padding:0 0 1.6rem;
border-bottom:1px solid var(--line)}
.tried:last-child{border:0}.tried img{width:100%}.tried dl{margin:0}
.tried dl div{display:grid;grid-template-columns:2.6rem minmax(0,1fr);padding:0 0 .8rem}
.tried dt{font-weight:650;color:var(--accent)}.tried dd{margin:0}.tried dd .meta{display:block}
.tried dl div:last-child dt,.tried dl div:last-child dd{color:var(--muted);font-weight:450}
details{margin:.9rem 0}
summary{cursor:pointer;font-weight:500;width:fit-content}
details[open]>summary{margin-bottom:.5rem}
footer{color:var(--muted);font-size:.85rem;padding:44px 24px 56px}
.zoom{cursor:zoom-in;padding:0;border:0;background:none;width:100%;display:block;font:inherit}
dialog{border:0;padding:0;background:none;max-width:96vw;max-height:96vh;margin:auto;color:#efe8e3;overflow:auto}
dialog::backdrop{background:rgb(12 8 8/.96)}
dialog .two{display:flex;gap:10px;justify-content:center;align-items:start}
@media (orientation:portrait){dialog .two{flex-direction:column;align-items:center}}
dialog figure{margin:0}
dialog figure+figure{border-left:0}
dialog:focus{outline:none}
dialog img{max-width:none;background:none}
dialog p{margin:10px auto 0;text-align:center;font-size:.95rem}
dialog p.keys{color:#b3a69f;font-size:.8rem;margin-top:4px}
@media (hover:none){dialog p.keys{display:none}}
dialog figcaption{color:#b3a69f;text-align:center}
@media (max-width:700px){main,header{padding:0 16px}header{padding-top:24px}footer{padding:32px 16px}
section{padding-top:32px;margin-top:32px}svg.wide{display:none}svg.narrow{display:block}
.tiles{display:grid;grid-template-columns:repeat(2,minmax(0,1fr))}
.tiles div:last-child:nth-child(odd){grid-column:1/-1}
.tiles .value{font-size:1.3rem;white-space:normal}.tiles div{padding:12px 12px 11px}
.figures svg{width:96px}.figures tbody th{white-space:normal;min-width:7rem;max-width:11rem}
.strip td{min-width:104px}.graphs svg text{font-size:12px}.readout span{display:block;margin:0}
.scores thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.scores tbody tr{display:grid;grid-template-columns:repeat(3,1fr);border-bottom:1px solid var(--line);padding:10px 0}
.scores tbody th,.scores tbody td:nth-child(2){grid-column:1/-1}.scores svg{width:100%;max-width:264px;height:auto}
.scores .side{display:block;font-size:.8rem;color:var(--muted)}
table.scores tbody th,table.scores tbody td{border:0;padding:2px 8px 2px 0;min-width:0}
.examples{columns:2 140px;column-gap:14px}
.buckets{gap:7px 10px}.settings{columns:1}
.pairs,.pairs.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.pairs.large{gap:26px}}
@media (max-width:900px){.large .pair,.tried{display:block}.tried dl{margin:1rem 0 0}}
@media print{:root{color-scheme:light;--wash:#f6ece9;--paper:#fff;--surface:#fff;--ink:#000;--muted:#555;--line:#ccc;
--grid:#e6e6e6;--faint:#ccc;--accent:#a11d12;--amber:#96600a;--code:#f5f5f5}
body{font-size:10.5pt}main,header,footer{max-width:none;padding:0}nav,.readout,dialog{display:none}
section{margin-top:20pt;padding-top:14pt}h2,h3{break-after:avoid}
.pair,figure.wide,.graphs figure,.strip tr,.scores tr{break-inside:avoid}
.pairs.large,.pairs,.graphs{grid-template-columns:1fr 1fr}.graphs svg text{font-size:11px}.scroll{overflow:visible}
.strip{table-layout:fixed;width:100%}.strip td{min-width:0}.strip thead th{white-space:normal}svg.wide{display:block}
svg.narrow{display:none}}
"""

JS = """
(function(){'use strict';
document.querySelectorAll('figure[data-series]').forEach(function(figure){
 var data=JSON.parse(figure.dataset.series),out=figure.querySelector('.readout');
 function show(texts){out.replaceChildren.apply(out,texts.map(function(text){
  var span=document.createElement('span');span.textContent=text;return span}))}
 function nearest(points,epoch){var best=null;points.forEach(function(p){
  if(!best||Math.abs(p[0]-epoch)<Math.abs(best[0]-epoch))best=p});return best}
 figure.querySelectorAll('svg.graph').forEach(function(svg){
  var key=svg.classList.contains('narrow')?'narrow':'wide',f=data.frames[key];
  var line=document.createElementNS(svg.namespaceURI,'line');
  line.setAttribute('class','s-ink');line.setAttribute('y1',f.top);line.setAttribute('y2',f.bottom);
  line.setAttribute('visibility','hidden');svg.appendChild(line);
  ['pointerdown','pointermove'].forEach(function(kind){svg.addEventListener(kind,function(event){
   var box=svg.getBoundingClientRect(),x=(event.clientX-box.left)/box.width*svg.viewBox.baseVal.width;
   x=Math.max(f.left,Math.min(f.right,x));
   var epoch=f.first_epoch+(x-f.left)/(f.right-f.left)*(f.last_epoch-f.first_epoch);
   line.setAttribute('x1',x);line.setAttribute('x2',x);line.setAttribute('visibility','visible');
   show(data.series.map(function(s){var p=nearest(s.points,epoch);
    return p?s.name+' '+p[2].toFixed(4)+' (epoch '+(+p[0].toFixed(1))+', step '+p[1].toLocaleString('en')+')':''})
    .filter(Boolean))})});
  svg.addEventListener('pointerleave',function(){line.setAttribute('visibility','hidden')});
 });
 out.textContent='Hover over the graph, or tap it, to read its values.';
});
var shown=[],at=0,dialog=document.createElement('dialog');dialog.setAttribute('aria-label','Enlarged picture');
function draw(){var group=shown[at],row=document.createElement('div'),text=document.createElement('p'),
 keys=document.createElement('p');keys.className='keys';text.dir='auto';
 keys.textContent=(shown.length>1?'← → previous and next picture · ':'')+'Esc to close';
 row.className=group.images.length>1?'two':'two one';
 group.images.forEach(function(source){var figure=document.createElement('figure'),image=new Image(),
  caption=document.createElement('figcaption');
  image.src=source.src;image.alt=source.alt;image.className=source.className;
  caption.textContent=source.dataset.label||'';figure.append(image,caption);row.append(figure)});
 row.querySelectorAll('img').forEach(function(image,i,all){var source=group.images[i],
  upright=innerHeight>innerWidth,across=upright?1:all.length,down=upright?all.length:1,
  scale=Math.min(.94*innerWidth/across/source.naturalWidth,.8*innerHeight/down/source.naturalHeight);
  image.style.width=Math.round(scale*source.naturalWidth)+'px'});
 text.textContent=group.text;dialog.replaceChildren(row,text,keys)}
document.querySelectorAll('[data-zoom]').forEach(function(holder){
 var images=Array.from(holder.querySelectorAll('img'));if(!images.length)return;
 var index=shown.push({images:images,text:holder.dataset.zoom})-1;
 images.forEach(function(image){var button=document.createElement('button');
  button.className='zoom';button.type='button';
  button.setAttribute('aria-label','Enlarge: '+image.alt);image.replaceWith(button);button.append(image);
  button.addEventListener('click',function(){at=index;draw();dialog.showModal()})})});
document.body.append(dialog);
dialog.addEventListener('click',function(){dialog.close()});
dialog.addEventListener('keydown',function(event){var step=event.key==='ArrowRight'?1:event.key==='ArrowLeft'?-1:0;
 if(step){at=(at+step+shown.length)%shown.length;draw();event.preventDefault()}});
})();
"""


def content_security_policy() -> str:
    """Return the policy: embedded pictures, this style sheet and this script, by their hashes, and nothing else."""
    return (
        "default-src 'none'; img-src data:; "
        f"style-src '{_source_hash(CSS)}'; script-src '{_source_hash(JS)}'; base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
