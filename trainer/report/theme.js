(function(){'use strict';
var shown=[],at=0,dialog=document.createElement('dialog');dialog.setAttribute('aria-label','Enlarged picture');
var content=document.createElement('div'),turn=document.createElement('div');turn.className='turn';content.className='enlarged';
function turned(step){at=(at+step+shown.length)%shown.length;draw()}
[['←','Previous picture',function(){turned(-1)}],['Close','',function(){dialog.close()}],
 ['→','Next picture',function(){turned(1)}]].forEach(function(one){var button=document.createElement('button');
 button.type='button';button.textContent=one[0];button.autofocus=!one[1];if(one[1])button.setAttribute('aria-label',one[1]);
 button.addEventListener('click',function(event){event.stopPropagation();one[2]()});turn.append(button)});
dialog.append(content,turn);
function visible(image){return image.getClientRects().length>0}
function inOrder(a,b){return a.compareDocumentPosition(b)&Node.DOCUMENT_POSITION_FOLLOWING?-1:1}
function draw(){var group=shown[at],row=document.createElement('div'),text=document.createElement('p'),
 keys=document.createElement('p');keys.className='keys';text.dir='auto';
 keys.textContent=(shown.length>1?'← → previous and next picture · ':'')+'Esc to close';
 var images=group.images.filter(visible);if(!images.length)images=group.images;
 images=images.slice().sort(inOrder);
 row.className=images.length>1?'two':'two one';
 images.forEach(function(source){var figure=document.createElement('figure'),image=new Image(),
  caption=document.createElement('figcaption');
  image.src=source.src;image.alt=source.alt;image.className=source.className;
  caption.textContent=source.dataset.label||'';figure.append(image,caption);row.append(figure)});
 row.querySelectorAll('img').forEach(function(image,i,all){var source=images[i],
  upright=innerHeight>innerWidth,across=upright?1:all.length,down=upright?all.length:1,
  scale=Math.min(.94*innerWidth/across/source.naturalWidth,(.96*innerHeight-96-30*down)/down/source.naturalHeight);
  image.style.width=Math.round(scale*source.naturalWidth)+'px'});
 text.textContent=group.text;content.replaceChildren(row,text,keys);
 turn.firstChild.hidden=turn.lastChild.hidden=shown.length<2}
function enlargeable(root){root.querySelectorAll('[data-zoom]').forEach(function(holder){
 var images=Array.from(holder.querySelectorAll('img'));if(!images.length)return;
 var group={images:images,text:holder.dataset.zoom,holder:holder};shown.push(group);
 function enlarging(className,label){var button=document.createElement('button');
  button.className=className;button.type='button';button.setAttribute('aria-label','Enlarge: '+label);
  button.addEventListener('click',function(){at=shown.indexOf(group);draw();dialog.showModal()});return button}
 if(holder.dataset.zoomBy==='button'){var button=enlarging('enlarge',holder.dataset.zoom);
  button.textContent='Enlarge';holder.lastElementChild.append(button);
  // what lies under a handle is dragged, not clicked; the photograph beside it is free
  images.filter(function(image){return image.closest('.photo')}).forEach(function(image){wrap(image,enlarging)})}
 else images.forEach(function(image){wrap(image,enlarging)})})}
function wrap(image,enlarging){var button=enlarging('zoom',image.alt);image.replaceWith(button);button.append(image)}
enlargeable(document);
// a table that is wider than its place fades where it goes on; one that fits keeps its head in view
function edges(box){var right=box.scrollWidth-box.clientWidth-box.scrollLeft;
 box.classList.toggle('fits',box.scrollWidth<=box.clientWidth+1);
 box.classList.toggle('more-left',box.scrollLeft>1);box.classList.toggle('more-right',right>1)}
var sized=new ResizeObserver(function(entries){entries.forEach(function(entry){
 edges(entry.target.closest('.scroll'))})});
function watched(root){root.querySelectorAll('.scroll').forEach(function(box){
 box.addEventListener('scroll',function(){edges(box)},{passive:true});
 sized.observe(box);if(box.firstElementChild)sized.observe(box.firstElementChild)})}
watched(document);
// a part of a page that is served was replaced by its newer state (live.js)
addEventListener('swapped',function(event){enlargeable(event.detail.come);watched(event.detail.come);
 shown=shown.filter(function(group){return group.holder.isConnected}).sort(function(a,b){
  return inOrder(a.holder,b.holder)})});
document.body.append(dialog);
dialog.addEventListener('click',function(){dialog.close()});
dialog.addEventListener('keydown',function(event){var step=event.key==='ArrowRight'?1:event.key==='ArrowLeft'?-1:0;
 if(step){turned(step);event.preventDefault()}});
// paper cannot be unfolded: what is folded is printed, except the tables that stand for charts, and what a file has
var unfolded=[];
addEventListener('beforeprint',function(){document.querySelectorAll('details:not([open])').forEach(function(one){
 if(!one.closest('figure.chart')&&!one.matches('.in-file')){one.open=true;unfolded.push(one)}})});
addEventListener('afterprint',function(){unfolded.splice(0).forEach(function(one){one.open=false})});
})();
