'use strict';

// A click on the head of a column sorts its table; a second click reverses it.
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const value = (row) => {
      const text = row.cells[column].textContent.trim();
      const number = parseFloat(text);
      return Number.isNaN(number) ? text : number;
    };
    const compare = (one, other) => {
      const [a, b] = [value(one), value(other)];
      if (typeof a === 'number' && typeof b === 'number') return a - b;
      return String(a).localeCompare(String(b));
    };
    const sort = () => {
      const turn = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      heads.forEach((each) => each.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', turn > 0 ? 'ascending' : 'descending');
      const rows = [...table.tBodies[0].rows];
      const empty = (row) => Number(value(row) === '');
      rows.sort((a, b) => empty(a) - empty(b) || turn * compare(a, b));
      table.tBodies[0].append(...rows);
    };
    head.tabIndex = 0;
    head.title = 'sort by this column';
    head.addEventListener('click', sort);
    head.addEventListener('keydown', (event) => {
      if (event.key === 'Enter') sort();
    });
  });
}

// Opens the folded parts around the target of a link.
const reveal = () => {
  const target = document.getElementById(location.hash.slice(1));
  for (let box = target; box; box = box.parentElement) {
    if (box.tagName === 'DETAILS') box.open = true;
  }
  if (target) target.scrollIntoView();
};
document.addEventListener('click', (event) => {
  if (event.target.closest('a[href^="#"]')) setTimeout(reveal);
});
addEventListener('hashchange', reveal);
reveal();

// Draws the learning curve of each run when its cell is opened.
document.addEventListener('toggle', ({ target }) => {
  for (const place of target.querySelectorAll('.curve:empty')) {
    const text = place.parentElement.querySelector('.errors').textContent;
    const errors = text.trim().split(' ').map(Number);
    const step = 110 / Math.max(errors.length - 1, 1);
    const points = errors.map((error, at) => `${at * step},${24 - 0.22 * error}`);
    if (text.trim()) {
      place.innerHTML = '<svg width="112" height="26"><polyline/></svg>';
      place.querySelector('polyline').setAttribute('points', points.join(' '));
    }
  }
}, true);

// Shows the cells whose title has every word of the filter.
const filter = document.getElementById('filter');
filter.hidden = false;
filter.addEventListener('input', () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const cell of document.querySelectorAll('details.cell')) {
    const title = cell.querySelector('summary').textContent.toLowerCase();
    cell.hidden = !words.every((word) => title.includes(word));
  }
});
