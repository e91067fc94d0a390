// Dark, light, or as the system: kept in this browser.

const KEY = "stepgraph-theme";
const THEMES = ["auto", "dark", "light"];
const SAID = { auto: "as the system", dark: "dark", light: "light" };

export class Theme {
  #theme = THEMES.find((theme) => theme === localStorage.getItem(KEY)) ?? "auto";

  /** `onChange()` is called whenever colours are others. */
  constructor(button, onChange) {
    this.button = button;
    this.onChange = onChange;
    button.addEventListener("click", () => this.next());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", onChange);
    this.#apply();
  }

  next() {
    this.#theme = THEMES[(THEMES.indexOf(this.#theme) + 1) % THEMES.length];
    localStorage.setItem(KEY, this.#theme);
    this.#apply();
    this.onChange();
  }

  #apply() {
    document.documentElement.dataset.theme = this.#theme;
    this.button.textContent = `◐ ${this.#theme[0].toUpperCase()}${this.#theme.slice(1)}`;
    this.button.setAttribute("aria-label", `Colours: ${SAID[this.#theme]}`);
  }
}
