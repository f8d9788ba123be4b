// one picture a prompt, of the epoch that the slider is at; without this script every prompt is a strip
(function () {
  'use strict';
  const start = root => {
    const section = root.querySelector('#samples'), control = section && section.querySelector('.epoch-slider');
    if (!control) return;
    const slider = control.querySelector('input'), shown = control.querySelector('output');
    const all = control.querySelector('button'), names = slider.dataset.names.split('|');
    const show = () => {
      shown.textContent = names[slider.value];
      slider.setAttribute('aria-valuetext', names[slider.value]);
      for (const cell of section.querySelectorAll('.frames li'))
        cell.classList.toggle('now', cell.dataset.place === slider.value);
    };
    slider.addEventListener('input', show);
    all.addEventListener('click', () => {
      const sliding = section.classList.toggle('sliding');
      all.setAttribute('aria-pressed', String(!sliding));
      all.textContent = sliding ? 'Show all epochs' : 'Show one epoch';
      control.classList.toggle('all', !sliding);
      slider.disabled = !sliding;
      shown.textContent = sliding ? names[slider.value] : 'all epochs';
    });
    section.classList.add('sliding');
    control.hidden = false;
    show();
  };
  start(document);
  addEventListener('swapped', event => start(event.detail.come));
})();
