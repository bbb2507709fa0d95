// The ladder: Δloss by scheme, with the standard error and the spread over seeds.
for (const element of document.querySelectorAll("[data-chart=ladder]")) {
  const index = element.dataset.index;
  const rungs = fx.data.ladders[index];
  const known = rungs.filter((rung) => rung.delta !== null);
  const sizes = known.map((rung) => Math.abs(rung.delta)).filter((size) => size > 0);
  const wide = sizes.length > 1 && Math.max(...sizes) > 30 * Math.min(...sizes);
  fx.choose(`ladder-scale-${index}`, wide ? "symlog" : "linear");

  const draw = (width) => {
    if (!known.length) return document.createTextNode("No scheme finished.");
    const narrow = width < 560;
    const left = Math.min(240, 24 + 7.4 * Math.max(...rungs.map((rung) => rung.scheme.length)));
    const name = (scheme) => fx.shortened(scheme, narrow ? (width - 90) / 6.8 : (left - 16) / 7.3);
    const order = ordering() === "delta"
      ? [...rungs].sort((a, b) => (a.delta ?? Infinity) - (b.delta ?? Infinity))
      : rungs;
    const ends = known.flatMap((rung) => [0, rung.delta - (rung.se ?? 0), rung.delta + (rung.se ?? 0), ...rung.seeds]);
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    const least = 10 ** Math.max(-4, Math.floor(Math.log10(Math.min(...sizes, 1))));
    const log = scale() === "symlog";
    const pad = narrow ? 0.08 : 0.05;
    const span = (high - low || 1) * (log ? 0 : pad);
    const y = { y: "scheme" };
    const reference = (rung) => rung.scheme === "fp";
    const title = (rung) => [
      rung.scheme,
      `Δloss ${fx.text(rung.delta, "nats")}${rung.se === null ? "" : ` ± ${rung.se.toFixed(4)}`}`,
      ...(rung.seeds.length > 1 ? [`seeds ${rung.seeds.map((d) => fx.text(d, "nats")).join("  ")}`] : []),
    ].join("\n");
    return Plot.plot({
      width,
      height: rungs.length * (narrow ? 38 : 30) + 46,
      marginLeft: narrow ? 8 : left,
      marginRight: narrow ? 74 : 84,
      marginTop: narrow ? 26 : 12,
      marginBottom: 34,
      x: {
        type: log ? "symlog" : "linear", constant: log ? least : undefined,
        domain: log ? [low < 0 ? low * 1.2 : 0, high > 0 ? high * 1.05 : 0] : [low - (low < 0 ? span : 0), high + span],
        ticks: log ? fx.decades(low, high, narrow ? least * 10 : least) : narrow ? 4 : 7,
        tickFormat: (x) => fx.text(x, "number"), label: "Δloss, nats a token", labelAnchor: "right", labelArrow: "none",
      },
      y: { domain: order.map((rung) => rung.scheme), label: null, axis: null, padding: 0.3 },
      marks: [
        Plot.gridX({ ticks: log ? fx.decades(low, high, least) : narrow ? 4 : 7, stroke: "var(--line)", strokeOpacity: 1 }),
        Plot.ruleX([0], { stroke: "var(--rule)" }),
        narrow
          ? Plot.text(rungs, { ...y, text: (rung) => name(rung.scheme), frameAnchor: "left", textAnchor: "start", dy: -15, fill: "var(--ink)", fontFamily: "var(--mono)", fontSize: 11, stroke: "var(--paper)", strokeWidth: 4 })
          : Plot.axisY({ tickSize: 0, tickPadding: 12, tickFormat: name, fontFamily: "var(--mono)", fontSize: 12, fill: "var(--ink)" }),
        Plot.link(known, { x1: 0, x2: "delta", y1: "scheme", y2: "scheme", stroke: "var(--rule)", strokeWidth: 1 }),
        Plot.link(known.filter((rung) => rung.se), { x1: (r) => r.delta - r.se, x2: (r) => r.delta + r.se, y1: "scheme", y2: "scheme", stroke: "var(--accent)", strokeOpacity: 0.32, strokeWidth: 9, className: "standard-error" }),
        Plot.link(known.filter((rung) => rung.seeds.length > 1), { x1: (r) => Math.min(...r.seeds), x2: (r) => Math.max(...r.seeds), y1: "scheme", y2: "scheme", stroke: "var(--accent)", strokeWidth: 1.6, className: "seed-range" }),
        Plot.tickX(known.filter((rung) => rung.seeds.length > 1).flatMap((r) => r.seeds.map((delta) => ({ scheme: r.scheme, delta }))), { x: "delta", ...y, stroke: "var(--accent)", strokeWidth: 1.6, inset: narrow ? 7 : 4.5 }),
        Plot.dot(known, { x: "delta", ...y, r: 4.2, fill: (r) => (reference(r) ? "var(--paper)" : "var(--accent)"), stroke: "var(--accent)", strokeWidth: 1.6 }),
        Plot.text(known, { ...y, text: (r) => (reference(r) && r.delta === 0 ? "0" : fx.text(r.delta, "nats")), frameAnchor: "right", textAnchor: "start", dx: 14, fill: "var(--ink)", fontSize: 12 }),
        Plot.text(rungs.filter((rung) => rung.error !== null), { ...y, x: 0, text: () => "failed", textAnchor: "start", dx: 8, fill: "var(--warm)" }),
        Plot.tip(known, Plot.pointerY({ x: "delta", ...y, title, ...fx.tip, anchor: narrow ? "bottom" : undefined })),
      ],
    });
  };
  const redraw = fx.chart(element, draw);
  const scale = fx.choice(`ladder-scale-${index}`, redraw);
  const ordering = fx.choice(`ladder-order-${index}`, redraw);
}
