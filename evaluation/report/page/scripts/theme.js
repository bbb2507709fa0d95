// The theme: as the system says, or light, or dark. Colours are CSS variables, nothing is redrawn.
(() => {
  const names = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  let store = null;
  try { store = window.localStorage; } catch { /* refused for this page: not kept, then */ }
  let theme = store?.getItem("fxquant-theme");
  if (!names.includes(theme)) theme = "auto";

  function apply() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.querySelector(".theme-name").textContent = theme[0].toUpperCase() + theme.slice(1);
    button.setAttribute("aria-label", `Colour theme: ${theme === "auto" ? "as the system" : theme}`);
  }
  button.addEventListener("click", () => {
    theme = names[(names.indexOf(theme) + 1) % names.length];
    store?.setItem("fxquant-theme", theme);
    apply();
  });
  apply();
})();
