// Light, dark or as the system has it. Not a module: it runs before the first paint.
"use strict";

(() => {
  const ORDER = ["system", "light", "dark"];
  const KEY = "understudy-theme";
  const root = document.documentElement;

  // Storage may be forbidden; then the choice lasts as long as the page.
  function remembered() {
    try {
      const found = localStorage.getItem(KEY);
      return ORDER.includes(found) ? found : "system";
    } catch {
      return "system";
    }
  }

  function remember(theme) {
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // see above
    }
  }

  function apply(theme) {
    root.dataset.theme = theme;
    root.dispatchEvent(new Event("theme"));
  }

  apply(remembered());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(root.dataset.theme));

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => { button.textContent = `Theme: ${root.dataset.theme}`; };
    button.addEventListener("click", () => {
      const next = ORDER[(ORDER.indexOf(root.dataset.theme) + 1) % ORDER.length];
      remember(next);
      apply(next);
      name();
    });
    name();
  });
})();
