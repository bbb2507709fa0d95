// Tabs over panels: the arrow keys, Home and End move between them. Without scripts all panels show.
for (const list of document.querySelectorAll("[role=tablist]")) {
  const tabs = [...list.querySelectorAll("[role=tab]")];
  const select = (chosen, focus) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !on;
    }
    if (focus) chosen.focus();
  };
  list.addEventListener("click", (event) => {
    const tab = event.target.closest("[role=tab]");
    if (tab) select(tab, false);
  });
  list.addEventListener("keydown", (event) => {
    const at = tabs.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    select(tabs[(to + tabs.length) % tabs.length], true);
  });
  select(tabs[0], false);
}
for (const button of document.querySelectorAll("[data-open-all]")) {
  button.addEventListener("click", () => {
    const all = [...button.closest(".panel").querySelectorAll(".history details")];
    const open = all.some((details) => !details.open);
    for (const details of all) details.open = open;
    button.textContent = open ? "Close all diffs" : "Open all diffs";
  });
}
