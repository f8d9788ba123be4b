(function(){'use strict';
var charts=[],ink={},root=getComputedStyle(document.documentElement),paper=matchMedia('print');
// canvases know no style sheet: the theme's colours are read when it changes
function readColors(){['ink','muted','grid','faint','paper','wash','accent','amber','blue','teal','plum','olive',
 'ramp1','ramp2','ramp3','ramp4','ramp5','ramp6','ramp7','ramp8'].forEach(function(name){
  ink[name]=root.getPropertyValue('--'+name).trim()})}
function repaint(){readColors();charts.forEach(function(chart){chart.plot.redraw()})}
function font(size,weight){return (weight||'')+' '+size+'px '+getComputedStyle(document.body).fontFamily}
function digits(value){return value.toLocaleString('en',{maximumFractionDigits:10})}
// decimals: of all values of a chart, null for values that take a power of ten
function show(value,decimals,unit){var size=Math.abs(value),text=decimals!==null&&size<1e15?
  value.toLocaleString('en',{minimumFractionDigits:decimals,maximumFractionDigits:decimals}).replace(/^-(?=[0,.]*$)/,''):
 size>=1e4?digits(Math.round(value)):size&&size<1e-3?value.toExponential(3).replace(/\.?0+e/,'e'):String(+value.toPrecision(4));
 return text.replace(/-/g,'−')+(unit?' '+unit:'')}
// the step at x: on the line between the known pairs (x, step)
function stepAt(pairs,x){if(pairs.length<2)return null;var i=1;while(i<pairs.length-1&&pairs[i][0]<x)i++;
 var a=pairs[i-1],b=pairs[i];return b[0]>a[0]?a[1]+(b[1]-a[1])*(x-a[0])/(b[0]-a[0]):b[1]}
// the nearest index with a value, from i onwards in one direction; -1 if there is none
function known(values,i,way){for(;i>=0&&i<values.length;i+=way)if(values[i]!=null)return i;return -1}
function logTicks(low,high){var ticks=[];
 for(var power=Math.floor(Math.log10(low));power<=Math.ceil(Math.log10(high));power++)
  for(var m=1;m<10;m++){var tick=+(m+'e'+power);if(tick>=low&&tick<=high)ticks.push(tick)}
 var round=ticks.filter(function(tick){return '125'.indexOf(tick.toExponential()[0])>=0});
 var tens=ticks.filter(function(tick){return tick.toExponential()[0]==='1'&&tick.toExponential()[1]==='e'});
 return round.length>12?tens:round.length>2?round:ticks}
// epochs are counted in tens, twos and fives, not in 2.5
var rounds=[];for(var power=-4;power<9;power++)[1,2,5].forEach(function(m){rounds.push(+(m+'e'+power))});
function extent(values){return values.length?[Math.min.apply(null,values),Math.max.apply(null,values)]:null}
function quantile(sorted,share){return sorted[Math.round(share*(sorted.length-1))]}

function draw(figure){
 var data=JSON.parse(figure.dataset.chart),box=figure.querySelector('.plot'),list=figure.querySelector('.curves');
 var items=Array.from(list.children),chart={group:data.group},factor=Math.pow(10,data.power);
 // the first curve is the most important one: it is drawn last, above the others
 var drawn=data.curves.slice().reverse(),num=drawn.length;
 function row(i){return num-i}
 var joined=uPlot.join(drawn.map(function(curve){return [curve.x,curve.y]}));
 if(!joined[0].length){box.textContent='No values.';box.classList.add('bare');return}
 var first=joined[0][0],last=joined[0][joined[0].length-1],width=last-first||Math.abs(last)||1;
 var whole=data.ticks?[-.5,data.ticks.length-.5]:[first-.012*width,last+.012*width];
 // the range of y fits the curves that are switched on, at the x that are shown; single raw values may lie outside
 var isSmall=figure.matches('.small'),hasSteps=data.steps.length>1&&!isSmall;
 function yRange(u){
  var from=u.series[0].idxs[0],to=u.series[0].idxs[1],fitted=[],raw=[];
  drawn.forEach(function(curve,i){
   var values=u.data[i+1];if(!u.series[i+1].show)return;
   var a=known(values,from,-1),b=known(values,to,1);a=a<0?from:a;b=b<0?to:b;
   for(var k=a;k<=b;k++)if(values[k]!=null&&!(data.log&&values[k]<=0))(curve.look==='raw'?raw:fitted).push(values[k]);
   ['low','high'].forEach(function(side){(curve[side]||[]).forEach(function(value,k){
    if(value!=null&&curve.x[k]>=u.data[0][a]&&curve.x[k]<=u.data[0][b]&&!(data.log&&value<=0))fitted.push(value)})})});
  raw.sort(function(a,b){return a-b});
  var range=extent(fitted.length<20000?fitted:fitted.filter(function(_,i){return i%8===0}))||
   (raw.length?[quantile(raw,.005),quantile(raw,.995)]:[data.log?.1:0,1]),low=range[0],high=range[1];
  if(data.log)return [low*.85,high*1.2];
  if(data.zero){if(raw.length)high=Math.max(high,quantile(raw,.99));return [Math.min(0,1.1*low),1.12*high||1]}
  if(!low&&!high)return [0,1];
  // single raw values decide nothing where another curve has a range of its own
  var spread=raw.length&&!(high>low)?quantile(raw,.9)-quantile(raw,.1):0;
  var margin=Math.max(.16*(high-low),.12*spread,.002*Math.abs(high),1e-9);
  return [low>=0?Math.max(0,low-.8*margin):low-margin,high+1.5*margin]}
 // of more names than there is room for, every second or third is written
 function every(u){var longest=Math.max.apply(null,data.ticks.map(function(text){return text.length}));
  return Math.ceil(data.ticks.length*(6.9*longest+8)/Math.max(1,u.over.clientWidth||u.width-60))}
 function hasRoom(u,i){var from=u.series[0].idxs[0],to=u.series[0].idxs[1],num=0;
  for(var k=from;k<=to;k++)num+=u.data[i][k]!=null;return 12*num<u.over.clientWidth}
 function axis(size,more){return Object.assign({stroke:function(){return ink.muted},font:font(12),size:size,gap:6,
  ticks:{show:false},grid:{stroke:function(){return ink.grid},width:1}},more)}
 var series=[{}].concat(drawn.map(function(curve){
  var color=function(){return ink[curve.color]||ink.accent},look=curve.look;
  return {show:curve.shown,stroke:color,alpha:look!=='raw'?1:curve.x.length>800?.35:.6,
   width:look==='raw'?.9:look==='line'?1.8:2,
   dash:look==='dashed'?[5,3]:undefined,paths:look==='steps'?uPlot.paths.stepped({align:-1}):undefined,
   points:{show:function(u,i){return curve.y.length===1||look==='dots'&&hasRoom(u,i)},size:6,width:0,fill:color}}}));
 var plot=chart.plot=new uPlot({width:box.clientWidth,height:box.clientHeight,series:series,legend:{show:false},
  padding:[10,18,0,0],
  scales:{x:{time:false,range:function(u,low,high){
    return first===last||(low===first&&high===last)?whole:[low,high]}},
   y:{distr:data.log?3:1,range:yRange}},
  axes:[axis(data.ticks?26:hasSteps?42:24,{label:data.ticks?data.x:undefined,labelFont:font(12),labelSize:18,labelGap:2,
    grid:{show:false},space:data.ticks?10:hasSteps?78:54,incrs:data.ticks?undefined:rounds,
    splits:data.ticks?function(){return data.ticks.map(function(_,i){return i})}:undefined,
    values:function(u,splits){return splits.map(function(x){
     if(data.ticks)return data.ticks[x]===undefined||x%every(u)?'':data.ticks[x];
     if(x<0||x>last+.001*width)return '';
     // the axis has its name to the left of the plot: a number that would run into it is left out
     if(u.valToPos(x,'x')<3.5*digits(x).length-8)return '';
     var step=hasSteps?stepAt(data.steps,x):null;
     return digits(x)+(step===null?'':'\n'+digits(Math.round(step)))})}}),
   axis(function(u,texts){return Math.max(data.ticks?24:46,
    12+Math.max.apply(null,(texts||['']).map(function(text){return 6.9*(text||'').length})))},{
    space:34,splits:data.log?function(u,i,low,high){return logTicks(low,high)}:undefined,filter:function(u,s){return s},
    values:function(u,splits){return splits.map(function(y){
     return digits(+(y/factor).toPrecision(6)).replace('-','−')})}})],
  cursor:{y:false,points:{size:7,width:0},drag:{x:!data.ticks,y:false,dist:6},
   sync:{key:data.group,setSeries:false,scales:['x',null]}},
  hooks:{drawAxes:[drawBelow],draw:[drawAbove],setCursor:[read],setScale:[scaled]}},joined,box);
 function drawBelow(u){
  var c=u.ctx,r=uPlot.pxRatio,b=u.bbox;c.save();c.beginPath();c.rect(b.left,0,b.width,b.top+b.height);c.clip();
  data.spans.forEach(function(span,i){if(i%2)return;var a=u.valToPos(span[0],'x',true),z=u.valToPos(span[1],'x',true);
   c.globalAlpha=.55;c.fillStyle=ink.grid;c.fillRect(a,b.top,z-a,b.height);c.globalAlpha=1});
  c.strokeStyle=ink.muted;c.lineWidth=r;c.setLineDash([2*r,3*r]);
  data.stages.forEach(function(stage){if(stage[0]<=first)return;var x=Math.round(u.valToPos(stage[0],'x',true))+.5;
   c.beginPath();c.moveTo(x,b.top);c.lineTo(x,b.top+b.height);c.stroke()});
  c.setLineDash([]);c.strokeStyle=ink.ink;c.globalAlpha=.5;
  data.marks.forEach(function(mark){var x=Math.round(u.valToPos(mark[0],'x',true))+.5;
   c.beginPath();c.moveTo(x,b.top);c.lineTo(x,b.top+b.height);c.stroke()});c.restore()}
 // intervals, names of stages, spans and marks, the ring; a name without room is left out
 function drawAbove(u){
  var c=u.ctx,r=uPlot.pxRatio,b=u.bbox;c.save();
  c.beginPath();c.rect(b.left-4*r,0,b.width+8*r,b.top+b.height);c.clip();c.lineWidth=1.5*r;
  drawn.forEach(function(curve,i){if(!curve.low||!u.series[i+1].show)return;c.strokeStyle=ink[curve.color];
   curve.x.forEach(function(x,k){if(curve.low[k]==null)return;var at=u.valToPos(x,'x',true);
    c.beginPath();c.moveTo(at,u.valToPos(curve.low[k],'y',true));c.lineTo(at,u.valToPos(curve.high[k],'y',true));
    c.stroke()})});
  function say(text,x,y,align,color,weight){c.font=font(12*r,weight);c.textAlign=align;c.textBaseline='alphabetic';
   c.lineWidth=4*r;c.lineJoin='round';c.strokeStyle=ink.paper;c.strokeText(text,x,y);c.fillStyle=color;c.fillText(text,x,y)}
  if(!isSmall){
   var parts=data.spans.concat(data.stages.map(function(stage,i){
    return [stage[0],i+1<data.stages.length?data.stages[i+1][0]:last,stage[1]]}));
   parts.forEach(function(part){
    var a=Math.max(u.valToPos(part[0],'x',true),b.left),z=Math.min(u.valToPos(part[1],'x',true),b.left+b.width);
    c.font=font(12*r);if(z-a>c.measureText(part[2]).width+14*r)
     say(part[2],a+7*r,b.top+12*r,'left',ink.muted)});
   // names of marks stand in a row under those of stages, to the right of their lines, else to the left
   var taken=[];
   data.marks.forEach(function(mark){
    var x=u.valToPos(mark[0],'x',true),end=b.left+b.width;c.font=font(12*r);
    if(x<b.left||x>end)return;
    var wide=c.measureText(mark[1]).width,spots=[x+6*r,x-6*r-wide].filter(function(from){
     return from>=b.left&&from+wide<=end&&taken.every(function(t){return from>t[1]+6*r||from+wide<t[0]-6*r})});
    if(spots.length){taken.push([spots[0],spots[0]+wide]);say(mark[1],spots[0],b.top+30*r,'left',ink.ink)}})}
  if(!data.ticks){c.restore();c.save();
   [data.x].concat(hasSteps?['step']:[]).forEach(function(name,i){
    c.font=font(12*r);c.textAlign='right';c.textBaseline='top';c.fillStyle=ink.muted;
    c.fillText(name,b.left-10*r,b.top+b.height+(6+18*i)*r)})}
  if(data.ring){var x=u.valToPos(data.ring[0],'x',true),y=u.valToPos(data.ring[1],'y',true);
   if(x>=b.left-1&&x<=b.left+b.width+1){
    c.beginPath();c.arc(x,y,5.5*r,0,7);c.lineWidth=1.6*r;c.strokeStyle=ink.ink;c.stroke();
    if(data.ring[2]){c.font=font(12*r,600);var room=c.measureText(data.ring[2]).width/2;
     var under=y-26*r<b.top,at=Math.max(b.left+room,Math.min(b.left+b.width-room,x));
     say(data.ring[2],at,under?y+20*r:y-11*r,'center',ink.ink,600)}}}
  c.restore()}

 var bar=document.createElement('div'),where=document.createElement('span'),tools=document.createElement('div');
 var said=document.createElement('output');said.className='plot-said';
 bar.className='plot-bar';bar.append(where,tools);box.after(bar,said);
 function button(text,name,act){var made=document.createElement('button');made.type='button';made.textContent=text;
  made.title=name;made.setAttribute('aria-label',name);made.addEventListener('click',act);tools.append(made);return made}
 var reset=data.ticks?null:button('Whole run','Show the whole run',function(){zoomAll(null)});
 if(!data.ticks){if(data.x!=='epoch'){reset.textContent='All';reset.setAttribute('aria-label','Show everything')}
  reset.disabled=true;button('−','Zoom out',function(){zoom(2)});button('+','Zoom in',function(){zoom(.5)})}
 function middle(){var x=plot.scales.x;return plot.cursor.idx==null||plot.cursor.left<0?(x.min+x.max)/2:
  plot.data[0][plot.cursor.idx]}
 function zoom(by){var x=plot.scales.x,at=middle(),span=(x.max-x.min)*by;
  if(span>=whole[1]-whole[0])return zoomAll(null);
  if(span<width/5000)return;var low=Math.max(whole[0],Math.min(whole[1]-span,at-span/2));zoomAll([low,low+span])}
 function zoomAll(range){charts.forEach(function(other){if(other.group!==data.group||other.isFixed)return;var to=range||other.whole;
  other.plot.setScale('x',{min:to[0],max:to[1]})})}
 function scaled(u,key){if(key==='x'&&reset){var x=u.scales.x;
  reset.disabled=x.min<=whole[0]+1e-9*width&&x.max>=whole[1]-1e-9*width}}
 chart.whole=whole;chart.isFixed=Boolean(data.ticks);

 // the values at the cursor, or at the end, beside the curves' names
 function short(x){return digits(+x.toFixed(Math.max(0,Math.ceil(Math.log10(500/width)))))}
 function place(x){var step=stepAt(data.steps,x);
  return data.ticks?data.ticks[Math.round(x)]:
   data.x+' '+short(x)+(step===null?'':' · step '+digits(Math.round(step)))}
 function read(u){
  var isOn=u.cursor.left>=0&&u.cursor.idx!=null,at=isOn?u.data[0][u.cursor.idx]:last,texts=[];
  where.textContent=(isOn||data.ticks?'':'end: ')+(isOn||!data.ticks?place(at):'');
  data.curves.forEach(function(curve,i){
   var out=items[i].querySelector('output'),r=row(i),values=u.data[r];
   var k=isOn?u.cursor.idxs[r]:known(values,values.length-1,-1);
   out.replaceChildren();if(!u.series[r].show||k==null||k<0||values[k]==null||(data.ticks&&!isOn))return;
   var text=show(values[k],data.decimals,data.unit),x=u.data[0][k],own=curve.low?curve.x.indexOf(x):-1;
   if(own>=0&&curve.low[own]!=null)text+=' ('+show(curve.low[own],data.decimals)+' to '+show(curve.high[own],data.decimals)+')';
   out.textContent=text;
   if(Math.abs(x-at)>1e-3*width){var small=document.createElement('small');small.textContent=' at '+short(x);
    out.append(small);text+=small.textContent}
   texts.push(curve.name+' '+text)});
  if(chart.isRead)said.textContent=place(at)+': '+texts.join(', ')}

 items.forEach(function(item,i){
  if(items.length<2)return;
  var name=item.querySelector('.curve'),made=document.createElement('button');made.type='button';made.className='curve';
  made.append.apply(made,Array.from(name.childNodes));name.replaceWith(made);
  made.setAttribute('aria-pressed',String(data.curves[i].shown));
  made.addEventListener('click',function(){var isOn=!plot.series[row(i)].show;
   made.setAttribute('aria-pressed',String(isOn));plot.setSeries(row(i),{show:isOn});read(plot)})});
 list.hidden=false;

 // with the keyboard: arrows move along the values, + and - zoom, Escape shows everything
 var dots=data.curves.filter(function(curve){return curve.look==='dots'});
 var stops=(dots.length?dots:data.curves.slice(0,1)).reduce(function(all,curve){return all.concat(curve.x)},[]);
 stops=Array.from(new Set(stops)).sort(function(a,b){return a-b});
 function go(way){
  var x=plot.scales.x,seen=stops.filter(function(stop){return stop>=x.min&&stop<=x.max});if(!seen.length)return;
  var jump=Math.max(1,Math.round(seen.length/60)),isOn=plot.cursor.left>=0&&plot.cursor.idx!=null;
  var now=isOn?plot.posToVal(plot.cursor.left,'x'):way>0?-Infinity:Infinity,best=0;
  seen.forEach(function(stop,k){if(Math.abs(stop-now)<Math.abs(seen[best]-now))best=k});
  var next=isOn?Math.max(0,Math.min(seen.length-1,best+way*jump)):way>0?0:seen.length-1;
  chart.isRead=true;
  plot.setCursor({left:plot.valToPos(seen[next],'x'),top:plot.over.clientHeight/2},true,true);chart.isRead=false}
 box.addEventListener('keydown',function(event){
  var key=event.key;if(event.ctrlKey||event.metaKey||event.altKey)return;
  if(key==='ArrowLeft'||key==='ArrowRight')go(key==='ArrowRight'?1:-1);
  else if(data.ticks)return;
  else if(key==='+'||key==='=')zoom(.5);
  else if(key==='-')zoom(2);
  else if(key==='Escape'||key==='0')zoomAll(null);
  else return;
  event.preventDefault()});
 box.setAttribute('aria-label',box.getAttribute('aria-label')+
  (data.ticks?'. Arrow keys read the values':'. Arrow keys read the values, plus and minus zoom, Escape shows everything'));
 // a finger along the plot reads it; up and down scrolls the page
 ['pointerdown','pointermove'].forEach(function(kind){plot.over.addEventListener(kind,function(event){
  if(event.pointerType!=='touch')return;var at=plot.over.getBoundingClientRect();
  plot.setCursor({left:event.clientX-at.left,top:event.clientY-at.top},true,true)})});
 charts.push(chart);chart.figure=figure;chart.items=items;
 chart.observer=new ResizeObserver(function(){
  if(paper.matches||!box.clientWidth||(box.clientWidth===plot.width&&box.clientHeight===plot.height))return;
  plot.setSize({width:box.clientWidth,height:box.clientHeight})});chart.observer.observe(box);chart.observer.box=box;
 read(plot)}

// a part of a page that is served was replaced by its newer state (live.js): its charts keep zoom and chosen curves
function titleOf(chart){return chart.figure.querySelector('.chart-title').textContent}
function pressed(item){var made=item.querySelector('button.curve');return made&&made.getAttribute('aria-pressed')}
function carry(old,now){
 now.items.forEach(function(item){old.items.forEach(function(other){
  if(item.querySelector('.curve').textContent===other.querySelector('.curve').textContent&&
   pressed(item)!==pressed(other)&&pressed(item))item.querySelector('button.curve').click()})});
 var x=old.plot.scales.x;
 if(!now.isFixed&&(x.min>old.whole[0]||x.max<old.whole[1]))now.plot.setScale('x',{min:x.min,max:x.max})}
addEventListener('swapped',function(event){
 var gone=charts.filter(function(chart){return event.detail.gone.contains(chart.figure)});
 charts=charts.filter(function(chart){return gone.indexOf(chart)<0});
 event.detail.come.querySelectorAll('figure[data-chart]').forEach(draw);
 charts.forEach(function(now){if(event.detail.come.contains(now.figure))gone.forEach(function(old){
  if(titleOf(old)===titleOf(now))carry(old,now)})});
 gone.forEach(function(chart){chart.observer.disconnect();chart.plot.destroy()})});

readColors();
document.querySelectorAll('figure[data-chart]').forEach(draw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change',repaint);
paper.addEventListener('change',repaint);
// drawn as wide as paper is, so that text is not shrunk with a wide window
var PAPER_PX=660;
function fit(){charts.forEach(function(chart){var box=chart.observer.box;if(!box.clientWidth&&!paper.matches)return;
 var isSmall=chart.figure.classList.contains('small');
 chart.plot.setSize(paper.matches?{width:Math.min(chart.plot.width,isSmall?PAPER_PX/2:PAPER_PX),height:chart.plot.height}:
  {width:box.clientWidth,height:box.clientHeight})})}
paper.addEventListener('change',fit);
})();
