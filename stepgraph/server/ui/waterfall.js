// Requests on the axis of time: queued, prefill chunk by chunk, tokens. Requests that do not overlap share a row.

import { AXIS, GUTTER, Plot } from "./plot.js";
import { count, duration, several, short } from "./format.js";
import { endOf } from "./store.js";

const ROW = 20;
const BAR = 12;
const TOP = 6;
const LEAST_ROWS = 4; // so that the page does not jump with every request
const MAX_ROWS = 32;
const ROWS_WITH_WORDS = 14; // beyond so many, rows are shared more closely
const MAX_MARKS = 20_000; // chunks and tokens that a frame looks at

export class Waterfall {
  #bars = []; // of the last drawing: {request, row, left, right}
  #hint = "";

  constructor(canvas, note) {
    this.plot = new Plot(canvas, 0);
    this.note = note;
  }

  /** Draw the requests of the window. `isMine(name)`: was it this page's chat that sent it? */
  draw({ store, window, filter, clockOffset, colours, isMine }) {
    const found = filter.requests(inView(store, window)).sort((a, b) => a.arrived - b.arrived);
    const { plot } = this;
    plot.measure(window);
    const words = new Map(found.map((request) => [request, wordsOf(request)]));
    let numRows = this.#arrange(found, store.latest, (request) => 12 + plot.context.measureText(words.get(request)).width);
    if (numRows > ROWS_WITH_WORDS) numRows = this.#arrange(found, store.latest, () => 2);
    plot.height = TOP + Math.max(LEAST_ROWS, Math.min(numRows, MAX_ROWS)) * ROW + AXIS;
    const g = plot.begin(window, clockOffset, colours);
    plot.label("requests", TOP + ROW / 2);
    let marks = 0;
    plot.clipped(() => {
      for (const bar of this.#bars) this.#drawBar(g, bar, store.latest);
      marks = this.#drawMarks(g, store, window);
      g.textAlign = "left";
      for (const bar of this.#bars) this.#drawWords(g, bar, words.get(bar.request), isMine(bar.request.name));
    });
    if (!found.length) plot.note(store.requests.size ? "No requests in view" : "No requests yet");
    const hidden = found.length - this.#bars.length;
    this.#hint = [
      hidden ? `${several(hidden, "request")} more than there is room for` : "",
      marks > MAX_MARKS ? "chunks and tokens show with less time in view" : "",
    ].filter(Boolean).join(" · ") || "Click a request to see its steps alone";
    if (!this.pointed) this.note.textContent = found.length ? this.#hint : "";
    Object.assign(plot.canvas.dataset, { requests: this.#bars.length, marks: Math.min(marks, MAX_MARKS) });
  }

  /** The request at a place on the canvas, if there is one. */
  requestAt(x, y) {
    const row = Math.floor((y - TOP) / ROW);
    return this.#bars.find((bar) => bar.row === row && bar.left - 3 <= x && x <= bar.right + 3)?.request ?? null;
  }

  /** Say of a request what its bar shows, or how to use this. */
  tellOf(request) {
    this.pointed = request !== null;
    if (request === null) {
      this.note.textContent = this.#hint;
      return;
    }
    const { arrived, scheduled, first_token: first, finished } = request;
    this.note.textContent = [
      request.name,
      request.state,
      `${several(request.prompt_tokens, "prompt token")}, ${count(request.cached_tokens)} cached`,
      several(request.output_tokens, "token"),
      scheduled == null ? null : `queued ${duration(scheduled - arrived)}`,
      first == null ? null : `first token after ${duration(first - arrived)}`,
      finished == null ? null : `${duration(finished - arrived)} in all, ended by ${request.finish_reason ?? "its end"}`,
    ].filter(Boolean).join(" · ");
  }

  /** Give each request the first row that is free from its arrival on. `wordsWidth(request)`: the room to keep behind it.
   * Returns how many rows there are. */
  #arrange(requests, latest, wordsWidth) {
    const { plot } = this;
    const last = []; // bar of each row
    this.#bars = [];
    for (const request of requests) {
      const left = plot.x(request.arrived);
      const right = Math.max(left + 2, plot.x(request.finished ?? latest));
      let row = last.findIndex((bar) => bar.until <= left);
      if (row < 0) row = last.length;
      if (row >= MAX_ROWS) continue;
      if (last[row]) last[row].room = left - last[row].right - 8;
      last[row] = { request, row, left, right, until: right + wordsWidth(request), room: plot.width - right - 10 };
      this.#bars.push(last[row]);
    }
    return last.length;
  }

  #drawBar(g, { request, row }, latest) {
    const { plot } = this;
    const part = (from, to, colour, alpha) => {
      if (from == null) return;
      const [a, b] = [plot.x(from), plot.x(to ?? latest)];
      g.globalAlpha = alpha;
      g.fillStyle = colour;
      g.fillRect(a, TOP + row * ROW + (ROW - BAR) / 2, Math.max(1, b - a), BAR);
      g.globalAlpha = 1;
    };
    const { arrived, scheduled, first_token: first, finished } = request;
    part(arrived, scheduled ?? finished, plot.colours.queued, 0.8);
    part(scheduled, first ?? finished, plot.colours.prefill, 0.35);
    part(first, finished, plot.colours.decode, 0.35);
  }

  /** Name a request behind its bar or, if there is no room, in its end. */
  #drawWords(g, { row, left, right, room }, text, isMine) {
    const { colours } = this.plot;
    const width = g.measureText(text).width;
    const isBehind = width <= room;
    const end = Math.min(right, this.plot.width - 14);
    if (!isBehind && end - Math.max(left, GUTTER) < 2 * width) return;
    const [x, y] = [isBehind ? right + 6 : end - width - 6, TOP + row * ROW + ROW / 2];
    if (!isBehind) {
      g.fillStyle = colours.panel;
      g.fillRect(x - 4, y - BAR / 2 + 1, width + 8, BAR - 2); // the bar goes on around it
    }
    g.fillStyle = isMine ? colours.accent : colours.quiet;
    g.fillText(text, x, y);
  }

  /** What each step did for each request; returns how many marks there are in the window, which may be too many to draw. */
  #drawMarks(g, store, window) {
    const { steps } = store;
    const rowOf = new Map(this.#bars.map(({ request, row }) => [request.id, row]));
    const begin = store.firstStepFrom(window.from);
    let marks = 0;
    let end = begin;
    for (; end < steps.length && steps.at(end).start <= window.to; end++) {
      marks += steps.at(end).requests?.length ?? 0;
      if (marks > MAX_MARKS) return marks;
    }
    for (let index = begin; index < end; index++) {
      const step = steps.at(index);
      const { prompts = 0, requests = [] } = step;
      requests.forEach(([id, tokens], place) => {
        const row = rowOf.get(id);
        if (row !== undefined) this.#drawMark(g, step, TOP + row * ROW + (ROW - BAR) / 2, tokens, place < prompts);
      });
    }
    return marks;
  }

  #drawMark(g, step, y, tokens, isPrompt) {
    const { plot } = this;
    const [left, right] = [plot.x(step.start), plot.x(endOf(step))];
    g.fillStyle = isPrompt ? plot.colours.prefill : plot.colours.decode;
    if (!isPrompt) {
      // a token is there when its step ends
      if (tokens > 0) g.fillRect(right - 1, y, Math.max(1, Math.min(3, right - left - 1)), BAR);
      return;
    }
    g.fillRect(left, y, Math.max(1, right - left - 1), BAR);
    const text = count(tokens);
    if (right - left < g.measureText(text).width + 6) return;
    g.fillStyle = plot.colours.panel;
    g.textAlign = "center";
    g.fillText(text, (left + right) / 2, y + BAR / 2);
  }
}

const wordsOf = (request) =>
  `${short(request.name)} ${count(request.prompt_tokens)}→${count(request.output_tokens)}` +
  (request.finished == null || request.finish_reason === "stop" ? "" : ` ${request.finish_reason ?? request.state}`);

/** Requests that a window of time shows. */
export function inView(store, window) {
  return [...store.requests.values()].filter(
    (each) => (each.arrived ?? 0) <= window.to && (each.finished ?? store.latest) >= window.from,
  );
}
