"use strict";
for (const browser of document.querySelectorAll(".browser")) {
  const rows = Array.from(browser.querySelectorAll("tbody tr"));
  const body = browser.querySelector("tbody");
  const pictures = JSON.parse(browser.querySelector(".pictures").textContent);
  const query = browser.querySelector(".query");
  const verdict = browser.querySelector("select.verdict");
  const category = browser.querySelector("select.category");
  const shown = browser.querySelector(".shown");
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const categories = rows.map((row) => JSON.parse(row.dataset.categories));
  for (const image of browser.querySelectorAll("img[data-picture]")) {
    image.src = pictures[Number(image.dataset.picture)];
  }
  const apply = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, index) => {
      const keep = (!verdict.value || row.dataset.verdict === verdict.value)
        && (!category || !category.value || categories[index].includes(category.value))
        && words.every((word) => texts[index].includes(word));
      row.hidden = !keep;
      count += keep;
    });
    shown.textContent = `${count} of ${rows.length}`;
  };
  let sorted = { key: "order", down: false };
  const sort = (key) => {
    // the worst answers first, the list's own order from its beginning
    sorted = { key, down: sorted.key === key ? !sorted.down : key === "badness" };
    const sign = sorted.down ? -1 : 1;
    const ordered = [...rows].sort((a, b) => sign * (Number(a.dataset[key]) - Number(b.dataset[key]))
      || Number(a.dataset.order) - Number(b.dataset.order));
    body.append(...ordered);
    for (const button of browser.querySelectorAll("th button")) {
      const own = button.dataset.key === key;
      button.parentElement.setAttribute("aria-sort", own ? (sorted.down ? "descending" : "ascending") : "none");
    }
  };
  for (const control of [query, verdict, category]) if (control) control.addEventListener("input", apply);
  for (const button of browser.querySelectorAll("th button")) {
    button.addEventListener("click", () => sort(button.dataset.key));
  }
}
