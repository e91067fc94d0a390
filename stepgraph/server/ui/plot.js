// What all plots share: a canvas as fine as the screen, the axis of time, colours of the style sheet.

import { clock } from "./format.js";

export const GUTTER = 68; // pixels left of the plot, for labels
export const AXIS = 18; // pixels below it, for times
const RIGHT = 12;
const FONT = "11px system-ui, sans-serif";
const COLOURS = [
  "text", "quiet", "line", "panel", "accent", "prefill", "decode", "mixed", "other", "eager", "queued", "kv", "running", "waiting",
];

/** The colours of the style sheet as it is now. */
export function palette() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(COLOURS.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

export const colourOf = (colours, kind) => colours[kind] ?? colours.other;

export class Plot {
  /** `canvas` fills the width of its parent and is `height` pixels high, which may be set anew before a drawing. */
  constructor(canvas, height) {
    this.canvas = canvas;
    this.height = height;
    this.context = canvas.getContext("2d");
  }

  /** Begin a drawing of a window of time: an empty canvas with grid and times. `clockOffset` makes Unix time of the
   * engine's; without it there are no times. */
  begin(window_, clockOffset, colours) {
    this.measure(window_);
    const ratio = window.devicePixelRatio || 1;
    const [w, h] = [Math.round(this.width * ratio), Math.round(this.height * ratio)];
    if (this.canvas.width !== w || this.canvas.height !== h) {
      [this.canvas.width, this.canvas.height] = [w, h];
      this.canvas.style.width = `${this.width}px`;
      this.canvas.style.height = `${this.height}px`;
    }
    this.colours = colours;
    const g = this.context;
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, this.width, this.height);
    g.font = FONT;
    g.textBaseline = "middle";
    this.#axis(clockOffset);
    return g;
  }

  /** Make places on the canvas known before it is drawn, for what its height depends on. */
  measure(window_) {
    this.width = Math.max(GUTTER + RIGHT + 40, this.canvas.parentElement.clientWidth);
    this.from = window_.from;
    this.span = window_.span;
    this.inner = this.width - GUTTER - RIGHT;
    this.scale = this.inner / this.span;
    this.context.font = FONT;
  }

  x(time) {
    return GUTTER + (time - this.from) * this.scale;
  }

  timeAt(x) {
    return this.from + (x - GUTTER) / this.scale;
  }

  /** A place on the screen as a share of the plot's width. */
  shareOf(clientX) {
    return (clientX - this.canvas.getBoundingClientRect().left - GUTTER) / this.inner;
  }

  /** Draw with nothing reaching into the gutter. */
  clipped(draw) {
    const g = this.context;
    g.save();
    g.beginPath();
    g.rect(GUTTER, 0, this.inner, this.height);
    g.clip();
    draw(g);
    g.restore();
  }

  /** A label in the gutter. */
  label(text, y, colour = this.colours.quiet) {
    const g = this.context;
    g.fillStyle = colour;
    g.textAlign = "right";
    g.fillText(text, GUTTER - 6, y);
  }

  /** A line across. */
  rule(y) {
    this.context.fillStyle = this.colours.line;
    this.context.fillRect(GUTTER, Math.round(y), this.inner, 1);
  }

  /** Words in the middle where there is nothing to draw. */
  note(text) {
    const g = this.context;
    g.textAlign = "center";
    g.font = "13px system-ui, sans-serif";
    const [x, y] = [GUTTER + this.inner / 2, (this.height - AXIS) / 2];
    const width = g.measureText(text).width + 16;
    g.fillStyle = this.colours.panel;
    g.fillRect(x - width / 2, y - 10, width, 20);
    g.fillStyle = this.colours.quiet;
    g.fillText(text, x, y);
  }

  #axis(clockOffset) {
    const g = this.context;
    const bottom = this.height - AXIS;
    this.rule(bottom);
    if (clockOffset === null) return;
    const step = stepOf(this.span / Math.max(2, Math.floor(this.inner / 110)));
    const fraction = step >= 1 ? 0 : Math.min(4, Math.ceil(-Math.log10(step)));
    const first = Math.ceil((this.from + clockOffset) / step);
    g.textAlign = "center";
    for (let tick = first; tick * step - clockOffset <= this.from + this.span; tick++) {
      const x = this.x(tick * step - clockOffset);
      g.fillStyle = this.colours.line;
      g.fillRect(Math.round(x), 0, 1, bottom + 4);
      if (x < GUTTER + 24 || x > this.width - 30) continue;
      g.fillStyle = this.colours.quiet;
      g.fillText(clock(tick * step, fraction), x, bottom + AXIS / 2 + 2);
    }
  }
}

/** The next of 1, 2, 5, 10, … seconds, or of minutes. */
function stepOf(least) {
  for (const step of [60, 120, 300, 600, 1800, 3600, 7200, 14400]) if (least > 30 && step >= least) return step;
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((digit) => digit * power).find((step) => step >= least) ?? 28800;
}
