// What the other scripts share: the data, numbers as text, charts that follow their width.
"use strict";
const fx = {
  data: JSON.parse(document.getElementById("data").textContent),

  // The same figures as the tables print.
  text(value, unit) {
    if (value === null || value === undefined) return "–";
    let text;
    if (unit === "nats") text = (value < 0 ? "" : "+") + (Math.abs(value) >= 5e-5 || value === 0 ? value.toFixed(4) : value.toExponential(1));
    else if (unit === "loss") text = value.toFixed(4);
    else if (unit === "share") text = (100 * value).toFixed(Math.abs(value) < 0.01 ? 4 : 2) + "%";
    else if (unit === "bits" || unit === "perplexity") text = Math.abs(value) < 1e6 ? value.toFixed(2) : value.toExponential(2);
    else if (unit === "seconds") text = value.toFixed(1);
    else if (unit === "decibel") text = value.toFixed(1) + " dB";
    else if (Number.isInteger(value)) text = value.toLocaleString("en");
    else text = String(Number(value.toPrecision(4)));
    return text.replace("-", "−");
  },

  // Draw into element now, and again when its width changes or it is shown. draw(width) -> node.
  chart(element, draw) {
    let width = 0;
    const redraw = () => { if (width > 0) element.replaceChildren(draw(width)); };
    new ResizeObserver(([entry]) => {
      const now = Math.floor(entry.contentRect.width);
      if (now !== width) { width = now; redraw(); }
    }).observe(element);
    return redraw;
  },

  // How every tip looks.
  tip: { stroke: "var(--rule)", lineHeight: 1.35, textPadding: 10 },

  // The value of the checked radio button of the group, and a call when it changes.
  choice(name, changed) {
    const inputs = document.querySelectorAll(`input[name="${name}"]`);
    for (const input of inputs) input.addEventListener("change", changed);
    return () => [...inputs].find((input) => input.checked)?.value;
  },

  choose(name, value) {
    document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
  },

  // Signed powers of ten and zero within [low, high], from the given smallest one on.
  decades(low, high, least) {
    const ticks = [0];
    for (let size = least; size <= Math.max(-low, high) * 1.0001; size *= 10) {
      if (size <= high * 1.0001) ticks.push(size);
      if (-size >= low * 1.0001) ticks.push(-size);
    }
    return ticks.sort((a, b) => a - b);
  },

  // At most ``length`` characters: the head and the tail, where schemes differ.
  shortened(text, length) {
    const room = Math.floor(length) - 1;
    if (text.length <= room + 1) return text;
    const tail = Math.floor(room / 2);
    return `${text.slice(0, room - tail)}…${text.slice(text.length - tail)}`;
  },

  shown(element) {
    return element.offsetParent !== null;
  },
};
