"use strict";
// Sorting, filtering and hiding of what the page already holds. Nothing is fetched and nothing is stored.
const form = document.querySelector("form");
const status = document.getElementById("status");
const sections = [...document.querySelectorAll("section")];

function value(row, index) {
  const text = row.children[index].dataset.v;
  if (text === undefined || text === "") return null;
  return row.children[index].dataset.n === "1" ? Number(text) : text;
}

function sort(button) {
  const head = button.closest("th");
  const index = [...head.parentNode.children].indexOf(head);
  const before = head.getAttribute("aria-sort");
  const first = head.dataset.first;
  const direction = before === null ? first : before === "ascending" ? "descending" : "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", direction);
  const body = head.closest("table").tBodies[0];
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [value(a, index), value(b, index)];
    if (x === null || y === null) return (x === null) - (y === null); // rows without a value stay last
    return sign * (typeof x === "number" ? x - y : x.localeCompare(y, "en"));
  });
  body.append(...rows);
  status.textContent = `Sorted by ${button.textContent.trim()}, ${direction}.`;
}

function filter() {
  const words = form.elements.name.value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...form.querySelectorAll("select")].filter((select) => select.value !== "");
  const published = form.elements.published.checked;
  const hidden = new Set([...form.querySelectorAll("[name=task]")].filter((box) => !box.checked).map((box) => box.value));
  let rows = 0;
  let tables = 0;
  for (const section of sections) {
    let shown = 0;
    for (const row of section.querySelectorAll("tbody tr")) {
      const has = (select) => (row.dataset[select.name] ?? section.dataset[select.name] ?? select.value) === select.value;
      const off = hidden.has(row.dataset.task) || !wanted.every(has) || !words.every((word) => row.dataset.name.includes(word));
      row.hidden = off;
      if (!off) shown += 1;
    }
    for (const cell of section.querySelectorAll("[data-column]")) cell.hidden = hidden.has(cell.dataset.column);
    section.hidden = shown === 0 || (section.classList.contains("published") && !published);
    if (!section.hidden && section.dataset.detail === undefined) {
      rows += shown;
      tables += 1;
    }
  }
  status.textContent = `${rows} row${rows === 1 ? "" : "s"} in ${tables} table${tables === 1 ? "" : "s"} shown.`;
}

for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => sort(button));
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filter));
form.hidden = false;
filter();
