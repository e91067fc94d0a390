// A model's text in the page. It is never read as HTML: all of it becomes text nodes, in elements that are made here: paragraphs,
// code, headings, bold. Work is bounded, whatever a model writes: a line is drawn once, long ones are broken, long answers end.

import { count, printable } from "./format.js";

const MAX_CHARACTERS = 200_000;
const MAX_LINE = 2_000; // a browser lays out a paragraph as a whole
const INLINE = /(`[^`]+`|\*\*[^*]+\*\*)/;

export class AnswerText {
  #left = MAX_CHARACTERS;
  #hidden = 0;
  #rest = null; // says how much is not shown
  #pending = "";
  #frame = 0;
  #line = "";
  #block = null;
  #code = null;
  #tail = document.createTextNode("");

  constructor(container) {
    this.container = container;
  }

  /** More text; it shows with the next frame. */
  add(text) {
    const room = text.slice(0, this.#left);
    this.#left -= room.length;
    this.#hidden += text.length - room.length;
    this.#pending += room;
    this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  /** Show all that was added. */
  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const lines = printable(this.#pending).split("\n");
    this.#pending = "";
    lines.forEach((text, index) => {
      this.#line += text;
      while (this.#line.length > MAX_LINE) {
        const piece = this.#line.slice(0, MAX_LINE);
        this.#line = this.#line.slice(MAX_LINE);
        this.#finish(piece);
        if (this.#code === null) this.#block = null;
      }
      if (index < lines.length - 1) {
        this.#finish(this.#line);
        this.#line = "";
      }
    });
    this.#showTail();
    if (this.#hidden) this.#sayRest();
  }

  /** The last line is whole, too. */
  end() {
    this.flush();
    if (this.#line) this.#finish(this.#line);
    this.#line = "";
    this.#tail.remove();
  }

  #finish(line) {
    this.#tail.remove();
    if (/^\s*```/.test(line)) {
      this.#block = null;
      this.#code = this.#code === null ? this.#append("pre", "code") : null;
    } else if (this.#code !== null) {
      this.#code.append(this.#code.hasChildNodes() ? `\n${line}` : line);
    } else if (line.trim() === "") {
      this.#block = null;
    } else if (/^#{1,6} /.test(line)) {
      this.#append("p", "heading").append(line.replace(/^#+ /, ""));
      this.#block = null;
    } else {
      this.#block ??= this.#append("p");
      if (this.#block.hasChildNodes()) this.#block.append("\n");
      inline(this.#block, line);
    }
  }

  #showTail() {
    this.#tail.remove();
    if (!this.#line) return;
    this.#tail.data = this.#line;
    const place = this.#code ?? (this.#block ??= this.#append("p"));
    if (place.hasChildNodes()) this.#tail.data = `\n${this.#line}`;
    place.append(this.#tail);
  }

  #append(...names) {
    const [tag, kind] = names;
    const element = document.createElement(tag);
    element.dir = "auto"; // a text's direction stays its own
    if (kind === "heading") element.className = kind;
    if (this.#rest) this.#rest.before(element);
    else this.container.append(element);
    if (kind !== "code") return element;
    const code = document.createElement("code");
    element.append(code);
    return code;
  }

  #sayRest() {
    this.#rest ??= this.container.appendChild(Object.assign(document.createElement("p"), { className: "quiet" }));
    this.#rest.textContent = `${count(this.#hidden)} more characters are not shown`;
  }
}

function inline(block, line) {
  for (const piece of line.split(INLINE)) {
    const tag = piece.length > 2 && piece.startsWith("`") ? "code" : piece.length > 4 && piece.startsWith("**") ? "strong" : null;
    const ends = tag === "code" ? 1 : 2;
    if (tag === null || !INLINE.test(piece)) block.append(piece);
    else block.appendChild(document.createElement(tag)).textContent = piece.slice(ends, -ends);
  }
}
