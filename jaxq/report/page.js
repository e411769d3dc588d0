"use strict";
const root = document.documentElement;
document.getElementById("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => {
      const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
      return text === "" || isNaN(text) ? text : Number(text);
    };
    const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
      : typeof a === "number" ? -1 : typeof b === "number" ? 1 : a.localeCompare(b);
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(key(a), key(b))).forEach((row) => body.append(row));
  }));
}
const open = () => {
  const card = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  const hidden = card && card.closest("details");
  if (hidden) { hidden.open = true; card.scrollIntoView(); }
};
addEventListener("hashchange", open);
open();
