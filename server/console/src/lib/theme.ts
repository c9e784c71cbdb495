// Light or dark as the system has it, until somebody chooses; kept for the tab.

const CHOICE = "loraplex-theme";

/** Charts listen: canvas colours do not follow a style sheet. */
export const THEME_CHANGED = "loraplex-theme-changed";

export function initialTheme(): void {
  const chosen = sessionStorage.getItem(CHOICE);
  if (chosen) document.documentElement.dataset.theme = chosen;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
}

export function toggleTheme(): void {
  const root = document.documentElement;
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  sessionStorage.setItem(CHOICE, root.dataset.theme);
  tell();
}

function tell(): void {
  dispatchEvent(new Event(THEME_CHANGED));
}
