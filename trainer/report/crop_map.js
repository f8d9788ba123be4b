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
      // the dot nearest to the pointer, within a few of the map's units
      const map = figure.querySelector('svg.crop-map'), said = figure.querySelector('.map-said'), rest = said.textContent;
      const dots = [...figure.querySelectorAll('path[data-set]')].flatMap(path =>
        [...path.getAttribute('d').matchAll(/M(\d+) (\d+)/g)].map(dot => [+dot[1], +dot[2], path]));
      map.addEventListener('pointermove', event => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
        let nearest = 12, found = null;
        for (const [x, y, path] of dots) {
          const away = Math.hypot(x - at.x, y - at.y);
          if (away < nearest && !path.classList.contains('off')) [nearest, found] = [away, path];
        }
        said.textContent = found ? found.dataset.name : rest;
      });
      said.hidden = false;
      for (const box of sets) box.disabled = false;
      choice.parentElement.hidden = false;
      figure.addEventListener('change', show);
    }
  };
  start(document);
  addEventListener('swapped', event => start(event.detail.come));
})();
