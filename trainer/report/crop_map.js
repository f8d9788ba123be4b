// switches sets and classes of a crop map on and off
(function () {
  'use strict';
  const start = root => {
    for (const figure of root.querySelectorAll('figure.crops')) {
      const sets = [...figure.querySelectorAll('input')], choice = figure.querySelector('select');
      const show = () => {
        const on = new Set(sets.filter(box => box.checked).map(box => box.value));
        for (const path of figure.querySelectorAll('path[data-set]'))
          path.classList.toggle('off', !on.has(path.dataset.set)
            || choice.value !== 'all' && path.dataset.class !== choice.value);
      };
      for (const box of sets) box.disabled = false;
      choice.parentElement.hidden = false;
      figure.addEventListener('change', show);
    }
  };
  start(document);
  addEventListener('swapped', event => start(event.detail.come));
})();
