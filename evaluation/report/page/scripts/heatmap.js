// Layers × kinds: one cell a site, coloured by the chosen figure; pointer and arrow keys read it.
for (const element of document.querySelectorAll("[data-chart=heatmap]")) {
  const index = element.dataset.index;
  const { cells, figures } = fx.data.explanations[index];
  const kinds = [...new Set(cells.map((cell) => cell.kind))];
  const blocks = [...new Set(cells.map((cell) => cell.block))].sort((a, b) => (a ?? 1e9) - (b ?? 1e9)).map((block) => block ?? "–");
  const place = (cell) => cell.block ?? "–";
  const last = (kind) => kind.split(".").at(-1);
  const short = new Set(kinds.map(last)).size === kinds.length ? last : (kind) => kind;
  const figure = element.closest("figure");
  const [select, readout, legend] = [figure.querySelector("select"), figure.querySelector(".readout"), figure.querySelector(".legend")];
  let at = null;

  // Values to colours: zero is the paper; loss-like figures have two sides, others run from the
  // least to the greatest.
  const colours = (key) => {
    const values = cells.map((cell) => cell.figures[key]).filter((value) => value !== null && value !== undefined);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const unit = figures.find((f) => f.key === key).unit;
    const signed = low < 0 && unit !== "decibel";
    const [from, to] = signed ? [0, Math.max(-low, high)] : [unit === "decibel" ? low : Math.min(0, low), high];
    const typical = (d3.median(values, Math.abs) || 1) / (to || 1);
    const bend = scale() === "log" && unit !== "decibel" ? (x) => Math.log1p(x / typical) / Math.log1p(1 / typical) : (x) => x;
    const mix = (hue, amount) => `color-mix(in oklab, var(--${hue}) ${(8 + 92 * bend(amount)).toFixed(1)}%, var(--panel))`;
    const amount = (value) => (to > from ? ((signed ? Math.abs(value) : value) - from) / (to - from) : 0.5);
    const hue = unit === "decibel" ? "accent" : "warm";
    const colour = (value) => (value === null || value === undefined ? "var(--panel)" : mix(value < 0 && signed ? "cool" : hue, amount(value)));
    const strong = (value) => value !== null && value !== undefined && bend(amount(value)) > 0.55;
    const ends = signed ? [-to, 0, to] : [from, to];
    const stops = d3.range(0, 1.01, 0.1).map((t) => colour(signed ? to * (2 * t - 1) : from + t * (to - from)));
    return { colour, strong, unit, ends, stops };
  };

  const describe = (cell) => {
    const chosen = figures.find((f) => f.key === select.value);
    const others = figures.filter((f) => f !== chosen).slice(0, 4);
    return { site: cell.site, chosen: `${chosen.label} ${fx.text(cell.figures[chosen.key], chosen.unit)}`,
      others: others.map((f) => `${f.label} ${fx.text(cell.figures[f.key], f.unit)}`) };
  };
  const read = (cell) => {
    const said = describe(cell);
    const strong = document.createElement("b");
    strong.textContent = said.chosen;
    readout.replaceChildren(`${said.site}: `, strong);
  };

  const draw = (width) => {
    const { colour, strong, unit, ends, stops } = colours(select.value);
    legend.replaceChildren(fx.text(ends[0], unit), Object.assign(document.createElement("i"), { style: `background:linear-gradient(90deg in oklab, ${stops.join(",")})` }), fx.text(ends.at(-1), unit));
    const upright = width < 560 && blocks.length > kinds.length;
    const [across, down] = upright ? [kinds, blocks] : [blocks, kinds];
    const margin = upright ? 34 : 20 + 7 * Math.max(...kinds.map((kind) => kind.length));
    const cellWidth = (width - margin - (upright ? 22 : 0)) / across.length;
    const cellHeight = upright ? 22 : Math.max(24, Math.min(34, cellWidth));
    const [x, y] = upright ? ["kind", place] : [place, "kind"];
    const every = Math.max(1, Math.ceil(26 / cellWidth));
    const longest = Math.max(...kinds.map((kind) => short(kind).length));
    const turned = upright && cellWidth < 9 * longest;
    const top = turned ? Math.max(64, 14 + 5.6 * longest) : upright ? 24 : 4;
    const plot = Plot.plot({
      width, height: cellHeight * down.length + top + (turned ? 6 : upright ? 16 : 36), marginLeft: margin, marginRight: turned ? 22 : 0, marginTop: top, marginBottom: upright ? 4 : 34,
      x: { domain: across, label: upright ? null : "block", labelAnchor: "right", labelArrow: "none", axis: upright ? "top" : "bottom", tickSize: 0, tickRotate: turned ? -60 : 0, tickFormat: upright ? short : undefined, ticks: upright ? undefined : across.filter((_, i) => i % every === 0), padding: 0 },
      y: { domain: down, label: null, tickSize: 0, padding: 0 },
      marks: [
        Plot.cell(cells, { x, y, fill: (d) => colour(d.figures[select.value]), inset: 0.75, rx: 2, className: "cells" }),
        cellWidth >= 58 ? Plot.text(cells, { x, y, text: (d) => fx.text(d.figures[select.value], unit), fill: (d) => (strong(d.figures[select.value]) ? "var(--on-strong)" : "var(--ink)"), fontSize: 11 }) : null,
        at ? Plot.cell([at], { x, y, fill: "none", stroke: "var(--ink)", strokeWidth: 2, rx: 2, className: "cursor" }) : null,
        Plot.tip(cells, Plot.pointer({ x, y, title: (d) => { const s = describe(d); return [s.site, s.chosen, ...s.others].join("\n"); }, ...fx.tip, maxRadius: 60 })),
      ],
    });
    plot.addEventListener("input", () => { if (plot.value) read(plot.value); });
    return plot;
  };

  const redraw = fx.chart(element, draw);
  const scale = fx.choice(`heat-scale-${index}`, redraw);
  const sizes = cells.map((cell) => Math.abs(cell.figures[select.value] ?? 0));
  fx.choose(`heat-scale-${index}`, d3.max(sizes) > 20 * d3.median(sizes) ? "log" : "linear");
  select.addEventListener("change", () => { redraw(); if (at) read(at); });
  element.addEventListener("keydown", (event) => {
    const upright = element.clientWidth < 560 && blocks.length > kinds.length;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [dx, dy] = move;
    const [dBlock, dKind] = upright ? [dy, dx] : [dx, dy];
    const position = at ? [blocks.indexOf(place(at)) + dBlock, kinds.indexOf(at.kind) + dKind] : [0, 0];
    const next = cells.find((cell) => place(cell) === blocks[position[0]] && cell.kind === kinds[position[1]]);
    if (next) { at = next; redraw(); read(at); }
  });
  element.addEventListener("blur", () => { at = null; redraw(); });
}
