// A site's input as a histogram, its calibrated range drawn in; what lies outside is clipped.
for (const element of document.querySelectorAll("[data-chart=histogram]")) {
  const index = element.dataset.index;
  const histograms = fx.data.inspections[index];
  const figure = element.closest("figure");
  const [select, readout] = [figure.querySelector("select"), figure.querySelector(".readout")];

  const draw = (width) => {
    const { edges, counts, low, high } = histograms[select.value];
    const bins = counts.map((count, i) => ({ from: edges[i], to: edges[i + 1], count })).filter((bin) => bin.count > 0);
    const log = scale() === "symlog";
    const sizes = edges.map(Math.abs).filter((size) => size > 0);
    const least = 10 ** Math.floor(Math.log10(Math.max(d3.max(sizes) * 1e-4, d3.quantile(sizes, 0.25) ?? 1e-3)));
    const top = d3.max(bins, (bin) => bin.count) ?? 1;
    const [left, right] = [Math.min(edges[0], low ?? Infinity), Math.max(edges.at(-1), high ?? -Infinity)];
    const outside = [low !== null && left < low ? [left, low] : null, high !== null && right > high ? [high, right] : null].filter(Boolean);
    const bounds = [low, high].filter((bound) => bound !== null);
    // Where outliers squeeze the range to a hair, its two labels part.
    const close = bounds.length === 2 && (high - low) / (right - left) < 90 / width;
    const clipped = (bin) => (low !== null && bin.to <= low) || (high !== null && bin.from >= high);
    const decades = fx.decades(left, right, least * (width < 560 ? 10 : 1));
    return Plot.plot({
      width, height: 260, marginLeft: 46, marginRight: 14, marginTop: 26, marginBottom: 36,
      x: { type: log ? "symlog" : "linear", constant: log ? least : undefined, domain: [left, right], label: "value; bars count elements", labelAnchor: "right", labelArrow: "none", ticks: log ? decades : width < 560 ? 5 : 9, tickFormat: (x) => fx.text(x, "number") },
      y: { type: "log", domain: [0.7, top * 1.6], label: null, ticks: 5, tickFormat: "~s", tickSize: 0, clamp: true },
      marks: [
        Plot.rect(outside, { x1: (d) => d[0], x2: (d) => d[1], y1: 0.7, y2: top * 1.6, fill: "var(--warm)", fillOpacity: 0.08, className: "clipped" }),
        Plot.gridY({ ticks: 5, stroke: "var(--line)", strokeOpacity: 1 }),
        Plot.rect(bins, { x1: "from", x2: "to", y1: 0.7, y2: "count", fill: (bin) => (clipped(bin) ? "var(--warm)" : "var(--accent)"), insetLeft: 0.4, insetRight: 0.4 }),
        Plot.ruleX(bounds, { stroke: "var(--ink)", strokeWidth: 1.4, className: "range" }),
        ...bounds.map((bound, i) => Plot.text([bound], { x: (d) => d, text: (d) => fx.text(d, "number"), frameAnchor: "top", dy: -16, fill: "var(--ink)", fontSize: 12, textAnchor: close ? ["end", "start"][i] : "middle" })),
        Plot.tip(bins, Plot.pointerX({ x: (bin) => (bin.from + bin.to) / 2, y: "count", title: (bin) => `${fx.text(bin.from, "number")} … ${fx.text(bin.to, "number")}\n${bin.count.toLocaleString("en")} elements${clipped(bin) ? ", outside" : ""}`, ...fx.tip })),
      ],
    });
  };

  const say = () => {
    const { edges, counts, low, high, share_clipped: share } = histograms[select.value];
    const range = low === null ? "no calibrated range" : `range ${fx.text(low, "number")} … ${fx.text(high, "number")}`;
    const strong = document.createElement("b");
    strong.textContent = range;
    readout.replaceChildren(strong, `, values ${fx.text(edges[0], "number")} … ${fx.text(edges.at(-1), "number")}, ${d3.sum(counts).toLocaleString("en")} elements`, share === null ? "" : `, ${fx.text(share, "share")} outside`);
  };
  const table = () => {
    const { edges, counts } = histograms[select.value];
    const rows = counts.map((count, i) => [edges[i], edges[i + 1], count]).map((values) => {
      const row = document.createElement("tr");
      for (const value of values) row.append(Object.assign(document.createElement("td"), { className: "number", textContent: fx.text(value, "number") }));
      return row;
    });
    figure.querySelector(".bins tbody").replaceChildren(...rows);
  };
  const redraw = fx.chart(element, draw);
  const scale = fx.choice(`hist-scale-${index}`, redraw);
  const show = (position) => { select.value = String((position + histograms.length) % histograms.length); say(); table(); redraw(); };
  select.addEventListener("change", () => show(Number(select.value)));
  for (const button of figure.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => show(Number(select.value) + Number(button.dataset.step)));
  }
  figure.querySelector("[data-most]").addEventListener("click", () => show(d3.maxIndex(histograms, (histogram) => histogram.share_clipped ?? -1)));
  say();
  table();
}
