// base and checkpoint over each other, with a handle between them; without this script they stand side by side
(function () {
  'use strict';
  const start = root => {
    const section = root.querySelector('#learned');
    if (!section) return;
    for (const sides of section.querySelectorAll('.sides')) {
      const card = sides.closest('.compared'), folded = card.querySelector('.others');
      const before = sides.querySelector('.before'), stepOf = side => +side.dataset.model.replace('step-', '');
      const after = [...card.querySelectorAll('.after')].sort((a, b) => stepOf(a) - stepOf(b));
      if (!before || !after.length) continue;
      const stage = document.createElement('div'), handle = document.createElement('input');
      stage.className = 'stage';
      handle.className = 'handle';
      Object.assign(handle, {type: 'range', min: 0, max: 100, step: 1, value: 50});
      sides.prepend(stage);
      stage.append(before, ...after, handle);
      if (folded) folded.remove();
      const divide = () => {
        stage.style.setProperty('--at', handle.value + '%');
        const now = stage.querySelector('.now figcaption');
        handle.setAttribute('aria-label', 'Divide between base and ' + (now ? now.textContent : 'trained model') +
          ': ' + card.dataset.zoom);
        handle.setAttribute('aria-valuetext', handle.value + ' % of the base shown');
      };
      handle.addEventListener('input', divide);
      stage.addEventListener('choose', divide);
      divide();
    }
    const choose = section.querySelector('.choose');
    if (!choose) return;
    choose.hidden = false;
    choose.addEventListener('change', event => {
      for (const side of section.querySelectorAll('.after'))
        side.classList.toggle('now', side.dataset.model === event.target.value);
      for (const stage of section.querySelectorAll('.stage')) stage.dispatchEvent(new Event('choose'));
    });
  };
  start(document);
  addEventListener('swapped', event => start(event.detail.come));
})();
