// The steps on the axis of time. Steps narrower than a pixel share one, so that a frame's work is bounded by the pixels, however
// many steps there are.

import { AXIS, GUTTER, Plot, colourOf } from "./plot.js";
import { count } from "./format.js";
import { endOf } from "./store.js";

const TOP = 14;
const TOKENS = 96; // height of the lane of tokens
const LANE = 12; // height of the lanes below
const GAP = 8;
const NEAR = 4; // pixels from a step that still mean it

export class Timeline {
  constructor(canvas) {
    this.plot = new Plot(canvas, 0);
  }

  /** Draw the steps of the window that match, and mark the one that is chosen. */
  draw({ store, window, filter, clockOffset, colours, chosen }) {
    const { steps } = store;
    const matches = filter.forSteps(store);
    const begin = store.firstStepFrom(window.from);
    let end = begin;
    let most = 8;
    let drafts = false;
    const shown = [];
    for (; end < steps.length && steps.at(end).start <= window.to; end++) {
      const step = steps.at(end);
      if (!matches(step)) continue;
      most = Math.max(most, step.tokens + step.padding);
      drafts ||= step.proposed > 0;
      shown.push(step);
    }
    const lanes = 1 + Number(drafts);
    const { plot } = this;
    plot.height = TOP + TOKENS + lanes * (GAP + LANE) + 6 + AXIS;
    const g = plot.begin(window, clockOffset, colours);
    this.shown = shown;
    const base = TOP + TOKENS;
    this.high = (tokens) => (Math.log2(1 + tokens) / Math.log2(1 + most)) * TOKENS;
    this.#scale(most, base);
    const host = base + GAP;
    const proposals = host + LANE + GAP;
    plot.label("host", host + LANE / 2);
    if (drafts) plot.label("accepted", proposals + LANE / 2);
    let drawn = 0;
    plot.clipped(() => {
      drawn = this.#bars(g, base, host, drafts ? proposals : null);
      if (chosen) this.#mark(g, chosen, base);
    });
    if (!shown.length) plot.note(emptyText(steps.length, filter));
    // for tests: what a frame costs, in steps looked at and in rectangles
    Object.assign(plot.canvas.dataset, { visited: end - begin, drawn, shown: shown.length });
  }

  /** The step at a place on the canvas, if there is one. */
  stepAt(offsetX) {
    if (!this.shown?.length) return null;
    const time = this.plot.timeAt(offsetX);
    let [low, high] = [0, this.shown.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.shown[middle].start <= time) low = middle + 1;
      else high = middle;
    }
    let best = null;
    let nearest = NEAR / this.plot.scale;
    for (const step of [this.shown[low - 1], this.shown[low]]) {
      if (!step) continue;
      const far = Math.max(0, step.start - time, time - endOf(step));
      if (far < nearest) [best, nearest] = [step, far || -1];
    }
    return best;
  }

  #scale(most, base) {
    const { plot } = this;
    plot.label("tokens", TOP - 6);
    plot.rule(base);
    for (let tokens = 1; tokens <= most; tokens *= 8) {
      const y = base - this.high(tokens);
      if (y < TOP + 4) break;
      plot.rule(y);
      plot.label(count(tokens), y);
    }
  }

  /** Bars of at least a pixel one by one; narrower ones together, the highest of each pixel. Returns how many were drawn. */
  #bars(g, base, host, proposals) {
    const { plot, shown } = this;
    const columns = new Array(Math.ceil(plot.inner) + 1);
    let drawn = 0;
    for (const step of shown) {
      const x = plot.x(step.start);
      const width = plot.x(endOf(step)) - x;
      if (width >= 1) {
        this.#bar(g, step, x, width, base, host, proposals);
        drawn++;
        continue;
      }
      const column = Math.floor(x - GUTTER);
      if (column < 0 || column >= columns.length) continue;
      const other = columns[column];
      if (!other || step.tokens > other.tokens || (step.reason !== null && other.reason === null)) columns[column] = step;
    }
    for (let column = 0; column < columns.length; column++) {
      if (!columns[column]) continue;
      this.#bar(g, columns[column], GUTTER + column, 1, base, host, proposals);
      drawn++;
    }
    return drawn;
  }

  #bar(g, step, x, width, base, host, proposals) {
    const { colours } = this.plot;
    const gap = width >= 4 ? 1 : 0; // so that steps without a pause between them stay apart
    const solid = Math.max(2, this.high(step.tokens));
    const whole = Math.max(solid, this.high(step.tokens + step.padding));
    g.fillStyle = colourOf(colours, step.kind);
    g.fillRect(x, base - solid, width - gap, solid);
    if (whole > solid + 0.5) {
      g.globalAlpha = 0.35;
      g.fillRect(x, base - whole, width - gap, whole - solid);
      g.globalAlpha = 1;
      if (width >= 6) hatch(g, x, base - whole, width - gap, whole - solid);
    }
    if (step.reason !== null) {
      g.strokeStyle = g.fillStyle = colours.eager;
      g.lineWidth = 2;
      if (width >= 4) g.strokeRect(x + 1, base - whole - 1, width - gap - 2, whole + 1);
      g.beginPath(); // a flag that shows at any width
      g.moveTo(x + width / 2 - 4, base - whole - 9);
      g.lineTo(x + width / 2 + 4, base - whole - 9);
      g.lineTo(x + width / 2, base - whole - 3);
      g.fill();
    }
    g.fillStyle = colours.quiet;
    if (step.plan_us != null) g.fillRect(this.plot.x(step.plan_start), host, this.#wide(step.plan_us), LANE);
    g.globalAlpha = 0.5; // the other half of the host's work: taking in what the step gave
    if (step.read_us != null) g.fillRect(this.plot.x(endOf(step)), host, this.#wide(step.read_us), LANE);
    g.globalAlpha = 1;
    if (proposals !== null && step.proposed > 0) {
      const share = (step.accepted / step.proposed) * LANE;
      g.fillStyle = colours.line;
      g.fillRect(x, proposals, width - gap, LANE);
      g.fillStyle = colours.other;
      g.fillRect(x, proposals + LANE - share, width - gap, share);
    }
    const text = step.graph === null ? "eager" : step.graph.replace("x", "×");
    if (width > 8 + g.measureText(text).width && solid > 16) {
      g.fillStyle = colours.panel;
      g.textAlign = "center";
      g.fillText(text, x + width / 2, base - 9);
    }
  }

  #wide(microseconds) {
    return Math.max(1, (microseconds / 1e6) * this.plot.scale);
  }

  #mark(g, step, base) {
    const { plot } = this;
    const x = plot.x(step.start);
    const width = Math.max(2, plot.x(endOf(step)) - x);
    g.strokeStyle = plot.colours.text;
    g.lineWidth = 2;
    const high = Math.max(4, this.high(step.tokens + step.padding));
    g.strokeRect(x, base - high - 1, width, high + 2);
    g.fillStyle = plot.colours.text;
    g.fillRect(x + width / 2 - 0.5, 0, 1, Math.max(0, base - high - 1));
  }
}

function hatch(g, x, y, width, height) {
  g.save();
  g.beginPath();
  g.rect(x, y, width, height);
  g.clip();
  g.lineWidth = 1;
  g.strokeStyle = g.fillStyle;
  g.beginPath();
  for (let at = x - height; at < x + width; at += 5) {
    g.moveTo(at, y + height);
    g.lineTo(at + height, y);
  }
  g.stroke();
  g.restore();
}

function emptyText(numSteps, filter) {
  if (!numSteps) return "No steps yet. They show as soon as a request runs.";
  return filter.isOn ? "No step in view passes the filter" : "No steps in view: Follow shows the latest, All shows everything";
}
