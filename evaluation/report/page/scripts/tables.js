// Tables that sort by a heading and filter by words. A value that is not there sorts last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];

  const value = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value.replace("inf", "Infinity"));
  };
  const absent = (x) => x === null || Number.isNaN(x);
  const compare = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));

  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const number = heading.classList.contains("number");
      const steps = number ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const next = steps[(steps.indexOf(heading.getAttribute("aria-sort")) + 1) % 3];
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const sorted = next === "none" ? original : [...original].sort((one, two) => {
        const [a, b] = [value(one, column), value(two, column)];
        if (absent(a) || absent(b)) return absent(a) - absent(b);
        return sign * compare(a, b);
      });
      body.append(...sorted);
    });
  });

  const input = document.querySelector(`input[aria-controls="${CSS.escape(table.id)}"]`);
  if (!table.id || !input) continue;
  const count = input.closest(".table-tools").querySelector(".count");
  const total = count.textContent;
  const contents = new Map(original.map((row) => [row, row.textContent.toLowerCase()]));
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    for (const row of original) {
      row.hidden = !words.every((word) => contents.get(row).includes(word));
      left += row.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${left} of ${total}` : total;
  });
}
