// Δloss by cause, for the whole model and each kind, and what is left after the worst sites are right.
for (const element of document.querySelectorAll("[data-chart=causes]")) {
  const { causes } = fx.data.explanations[element.dataset.index];
  const parts = causes.flatMap(([group, values]) => Object.entries(values).map(([cause, value]) => ({ group, cause, value })));
  const single = causes.length === 1;
  const names = [...new Set(causes.flatMap(([, values]) => Object.keys(values)))];
  const keys = document.createElement("div");
  keys.className = "keys";
  keys.innerHTML = names.map((cause) => `<span><i style="background:var(--${cause})"></i>${cause}</span>`).join("");
  if (!single) element.before(keys);
  const rows = single ? names : causes.map(([group]) => group);
  const beside = Math.max(92, 14 + 6.8 * Math.max(...rows.map((row) => row.length)));
  const draw = (width) => {
    // Names stand beside the bars where that leaves most of the width to these, else over them.
    const over = beside > 0.42 * width;
    const ticks = width - (over ? 8 : beside) < 320 ? 3 : 4;
    return Plot.plot({
      width,
      height: rows.length * (over ? 42 : 30) + 46,
      marginLeft: over ? 8 : beside, marginRight: 62, marginTop: over ? 16 : 6, marginBottom: 34,
      x: { label: "Δloss, nats a token", labelAnchor: "right", labelArrow: "none", ticks, tickFormat: (x) => fx.text(x, "number"), nice: true },
      y: { domain: rows, label: null, axis: null, padding: over ? 0.55 : 0.32 },
      marks: [
        Plot.gridX({ ticks, stroke: "var(--line)", strokeOpacity: 1 }),
        single
          ? Plot.barX(parts, { x: "value", y: "cause", fill: (d) => `var(--${d.cause})` })
          : Plot.barX(parts, { x: "value", y: "group", fill: (d) => `var(--${d.cause})`, order: names, z: "cause" }),
        single
          ? Plot.text(parts, { y: "cause", text: (d) => fx.text(d.value, "nats"), frameAnchor: "right", textAnchor: "start", dx: 8, fill: "var(--ink)", fontSize: 12 })
          : Plot.text(causes, { y: (d) => d[0], text: (d) => fx.text(d3.sum(Object.values(d[1])), "nats"), frameAnchor: "right", textAnchor: "start", dx: 8, fill: "var(--ink)", fontSize: 12 }),
        Plot.ruleX([0], { stroke: "var(--rule)" }),
        over
          ? Plot.text(rows, { y: (d) => d, text: (d) => d, frameAnchor: "left", textAnchor: "start", dy: -17, fill: "var(--ink)", fontSize: 11, stroke: "var(--paper)", strokeWidth: 4 })
          : Plot.axisY({ tickSize: 0, fill: "var(--ink)", fontSize: 12 }),
        Plot.tip(parts, Plot.pointerY(single
          ? { x: "value", y: "cause", title: (d) => `${d.cause}\n${fx.text(d.value, "nats")}`, ...fx.tip }
          : Plot.stackX({ x: "value", y: "group", z: "cause", order: names, title: (d) => `${d.group}\n${d.cause} ${fx.text(d.value, "nats")}`, ...fx.tip }))),
      ],
    });
  };
  fx.chart(element, draw);
}

for (const element of document.querySelectorAll("[data-chart=recovery]")) {
  const { recovery, causes, delta_loss: start } = fx.data.explanations[element.dataset.index];
  const points = recovery.map(([count, left]) => ({ count, left })).filter((point) => point.left !== null);
  if (!points.some((point) => point.count === 0)) points.unshift({ count: 0, left: start });
  fx.chart(element, (width) => Plot.plot({
    width, height: Math.min(290, Math.max(190, causes.length * 30 + 66)), marginLeft: 46, marginRight: 14, marginTop: 24, marginBottom: 34,
    x: { type: "point", domain: points.map((point) => point.count), label: "sites put right", labelAnchor: "right", labelArrow: "none", tickSize: 0 },
    y: { label: "Δloss left", labelArrow: "none", ticks: 4, nice: true, zero: true, tickFormat: (y) => fx.text(y, "number"), tickSize: 0 },
    marks: [
      Plot.gridY({ ticks: 4, stroke: "var(--line)", strokeOpacity: 1 }),
      Plot.ruleY([0], { stroke: "var(--rule)" }),
      Plot.areaY(points, { x: "count", y: "left", fill: "var(--accent)", fillOpacity: 0.1 }),
      Plot.lineY(points, { x: "count", y: "left", stroke: "var(--accent)", strokeWidth: 1.8 }),
      Plot.dot(points, { x: "count", y: "left", fill: "var(--accent)", r: 3.4 }),
      Plot.tip(points, Plot.pointerX({ x: "count", y: "left", title: (d) => `${d.count} site${d.count === 1 ? "" : "s"} put right\n${fx.text(d.left, "nats")} left`, ...fx.tip })),
    ],
  }));
}
