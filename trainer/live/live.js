// asks the server every few seconds what has changed, and puts the newer parts in the place of the older ones;
// scroll position, unfolded tables, chosen pictures and curves stay
(function () {
  'use strict';
  const bar = document.querySelector('.live'), says = bar.querySelector('.says'), when = bar.querySelector('.when');
  const live = bar.querySelector('.is-live');
  const EVERY_MS = 3000, SLOWLY_MS = 10000;
  const main = document.querySelector('main'), dialogs = document.getElementsByTagName('dialog');
  let isPressed = false, isAsking = false, timer = 0, lostAt = 0, skew = 0;

  const ago = seconds => {
    if (seconds < 5) return 'just now';
    for (const [size, name] of [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']])
      if (seconds >= size) return Math.floor(seconds / size) + ' ' + name + ' ago';
  };
  const tell = () => {
    for (const time of document.querySelectorAll('time[data-at]')) {
      const at = Number(time.dataset.at), text = ago(Date.now() / 1000 + skew - at);
      const said = time === when ? '· changed ' + text : text;
      if (time.textContent !== said) time.textContent = said;
      time.dateTime = new Date(1000 * at).toISOString();
      time.title = new Date(1000 * (at - skew)).toLocaleString();
    }
  };
  const say = text => { if (says.textContent !== text) says.textContent = text; };

  // what the reader has set in a part, read before the newer one stands beside it: radio buttons of one name exclude
  // each other
  const reachable = part => [...part.querySelectorAll('a, button, input, select, summary, [tabindex]')];
  const toggles = part => [...part.querySelectorAll('button[aria-pressed]:not(.curve)')];
  const wide = part => [...part.querySelectorAll('.scroll')];
  // elements by a name that they keep, and how many of that name came before
  function named(elements, nameOf) {
    const seen = {};
    return elements.map(element => {
      const name = nameOf(element);
      seen[name] = (seen[name] || 0) + 1;
      return [name + '#' + seen[name], element];
    });
  }
  const inputs = part => named([...part.querySelectorAll('input, select')], input =>
    [input.type, input.name, input.className, input.type === 'range' ? '' : input.value].join(' '));
  const foldable = part => named([...part.querySelectorAll('details')], one =>
    one.firstElementChild ? one.firstElementChild.textContent.replace(/[\d,.]+/g, '') : '');
  const stateOf = part => ({
    focus: reachable(part).indexOf(document.activeElement),
    pressed: toggles(part).map(button => button.getAttribute('aria-pressed')),
    inputs: new Map(inputs(part).map(([name, {checked, value, max, dataset}]) =>
      [name, {checked, value, isAtEnd: value === max, names: (dataset.names || '').split('|')}])),
    unfolded: new Set(foldable(part).filter(([, one]) => one.open).map(([name]) => name)),
    scrolled: wide(part).map(box => box.scrollLeft),
  });
  function restore(part, state) {
    toggles(part).forEach((button, i) => {
      if (state.pressed[i] && state.pressed[i] !== button.getAttribute('aria-pressed')) button.click();
    });
    for (const [name, input] of inputs(part)) {
      const old = state.inputs.get(name), isBox = ['radio', 'checkbox'].includes(input.type);
      if (!old || (isBox ? old.checked === input.checked || input.type === 'radio' && !old.checked
        : old.value === input.value)) continue;
      if (isBox) input.checked = old.checked;
      else if (input.dataset.names) {
        // a slider over the epochs: at its end it follows the run, elsewhere it stays at its epoch
        const place = input.dataset.names.split('|').indexOf(old.names[old.value]);
        if (old.isAtEnd || place < 0) continue;
        input.value = place;
      } else input.value = old.value;
      for (const kind of ['input', 'change']) input.dispatchEvent(new Event(kind, {bubbles: true}));
    }
    for (const [name, one] of foldable(part)) one.open = one.open || state.unfolded.has(name);
    wide(part).forEach((box, i) => { box.scrollLeft = state.scrolled[i] || 0; });
    const focused = reachable(part)[state.focus];
    if (focused) focused.focus({preventScroll: true});
  }

  function replace(gone, come) {
    const state = stateOf(gone);
    // what stands at the top of the window stays there
    const top = [...document.querySelectorAll('[data-part]')]
      .find(part => part.getBoundingClientRect().bottom > bar.offsetHeight) || gone;
    const offset = top.getBoundingClientRect().top;
    gone.after(come);
    dispatchEvent(new CustomEvent('swapped', {detail: {gone, come}}));
    gone.remove();
    restore(come, state);
    const moved = (top === gone ? come : top).getBoundingClientRect().top - offset;
    if (Math.abs(moved) > 1) scrollBy({top: moved, behavior: 'instant'});
  }

  const fetched = async address => {
    const answer = await fetch(address, {cache: 'no-store'});
    if (!answer.ok) throw new Error(answer.status);
    return answer.json();
  };
  const isBusy = () => isPressed || [...dialogs].some(dialog => dialog.open);
  async function refresh(parts) {
    for (const [key, digest] of parts) {
      const gone = document.querySelector('[data-part="' + CSS.escape(key) + '"]');
      if (gone && gone.dataset.digest === digest) continue;
      const part = await fetched('part/' + encodeURIComponent(key));
      if (isBusy()) return;
      const come = document.createElement('div');
      come.dataset.part = key;
      come.dataset.digest = part.digest;
      const inert = document.createElement('template');
      inert.innerHTML = part.html;
      come.append(inert.content);
      if (gone) replace(gone, come);
      else {
        const before = parts.slice(0, parts.findIndex(one => one[0] === key)).reverse()
          .map(one => main.querySelector('[data-part="' + CSS.escape(one[0]) + '"]')).find(Boolean);
        if (before) before.after(come); else main.prepend(come);
        dispatchEvent(new CustomEvent('swapped', {detail: {gone: document.createElement('div'), come}}));
      }
    }
    const known = new Set(parts.map(one => one[0]));
    for (const part of main.querySelectorAll('[data-part]')) if (!known.has(part.dataset.part)) {
      part.remove();
      dispatchEvent(new CustomEvent('swapped', {detail: {gone: part, come: document.createElement('div')}}));
    }
  }

  async function ask() {
    clearTimeout(timer);
    if (isAsking) return;
    isAsking = true;
    try {
      const now = await fetched('version');
      if (now.look !== bar.dataset.look) return location.reload();
      skew = now.now - Date.now() / 1000;
      lostAt = 0;
      bar.classList.remove('lost');
      live.textContent = 'Live';
      bar.dataset.state = now.state;
      if (now.changed) when.dataset.at = now.changed;
      say(now.says);
      if (!isBusy()) await refresh(now.parts);
    } catch (error) {
      lostAt = lostAt || Date.now();
      bar.classList.add('lost');
      live.textContent = 'Not live';
      say('No answer since ' + new Date(lostAt).toLocaleTimeString() + '. If the server was started again, '
        + 'open the address that it printed. This page shows the last state');
    }
    isAsking = false;
    tell();
    timer = setTimeout(() => { if (!document.hidden) ask(); }, bar.dataset.state === 'running' ? EVERY_MS : SLOWLY_MS);
  }

  addEventListener('pointerdown', () => { isPressed = true; }, true);
  for (const kind of ['pointerup', 'pointercancel', 'blur'])
    addEventListener(kind, () => { isPressed = false; }, true);
  document.addEventListener('visibilitychange', () => { if (!document.hidden) ask(); });
  setInterval(tell, 1000);
  tell();
  timer = setTimeout(ask, EVERY_MS);
})();
