'use strict';

// A click on a column's head sorts its table; another one turns the order.
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

// A link into a closed part opens it.
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

// Cells of which the title has every word stay.
const filter = document.getElementById('filter');
filter.hidden = false;
filter.addEventListener('input', () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  for (const cell of document.querySelectorAll('details.cell')) {
    const title = cell.querySelector('summary').textContent.toLowerCase();
    cell.hidden = !words.every((word) => title.includes(word));
  }
});
