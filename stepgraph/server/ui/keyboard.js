// Keys, and the list of them that the help shows: one table, so that they cannot differ.

const $ = (id) => document.getElementById(id);
const SHOWN = { Escape: "Esc", ArrowLeft: "←", ArrowRight: "→" };

export class Keyboard {
  /** `keys`: lists of a key, what it does in words, and a function. */
  constructor(keys) {
    this.actions = new Map(keys.map(([key, , act]) => [key, act]));
    for (const [key, words] of keys) {
      const pair = $("keys").appendChild(document.createElement("div"));
      pair.appendChild(document.createElement("dt")).appendChild(document.createElement("kbd")).textContent = SHOWN[key] ?? key;
      pair.appendChild(document.createElement("dd")).textContent = words;
    }
    document.addEventListener("keydown", (event) => this.#press(event));
  }

  #press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    const isField = event.target.matches("input:not([type=checkbox]), textarea, select");
    if (isField && event.key === "Escape") event.target.blur();
    else if (isField) return;
    if (event.key.length === 1 && !$("shortcuts").checked) return;
    const act = this.actions.get(event.key);
    if (!act) return;
    event.preventDefault(); // the letter would end up in the field that gets the focus
    act();
  }
}
