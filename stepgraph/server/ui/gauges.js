// KV cache and queue over time.

import { AXIS, GUTTER, Plot } from "./plot.js";
import { count, percent } from "./format.js";

const TOP = 10;
const HIGH = 72;

export class Gauges {
  constructor(canvas, now) {
    this.plot = new Plot(canvas, TOP + HIGH + AXIS);
    this.now = now;
  }

  draw({ store, window, clockOffset, colours }) {
    const { plot } = this;
    const g = plot.begin(window, clockOffset, colours);
    const { gauges } = store;
    // a value holds until the next one: that before the window is its first
    const first = Math.max(0, gauges.firstFrom(window.from, (each) => each.time) - 1);
    let most = 1;
    let end = first;
    for (; end < gauges.length && gauges.at(end).time <= window.to; end++) {
      most = Math.max(most, gauges.at(end).running, gauges.at(end).waiting);
    }
    most += most % 2; // its half is labelled too
    const y = (share) => TOP + HIGH * (1 - share);
    for (const share of [0, 0.5, 1]) {
      plot.rule(y(share));
      plot.label(`${100 * share} % · ${count(most * share)}`, y(share));
    }
    if (end > first) {
      plot.clipped(() => {
        const used = (each) => (each.kv_total ? each.kv_used / each.kv_total : 0);
        this.#line(g, store, first, end, (each) => y(used(each)), colours.kv, y(0));
        this.#line(g, store, first, end, (each) => y(each.waiting / most), colours.waiting);
        this.#line(g, store, first, end, (each) => y(each.running / most), colours.running);
      });
    } else {
      plot.note(gauges.length ? "Nothing is known of this time" : "Nothing heard yet");
    }
    const last = gauges.length ? gauges.at(-1) : null;
    this.now.textContent = last
      ? `${count(last.kv_used)} of ${count(last.kv_total)} KV blocks used (${percent(last.kv_used, last.kv_total)}) · ` +
        `${count(last.running)} running · ${count(last.waiting)} waiting`
      : "";
    plot.canvas.dataset.visited = end - first;
  }

  #line(g, store, first, end, place, colour, ground = null) {
    const { plot } = this;
    const right = Math.min(plot.x(store.latest), GUTTER + plot.inner);
    g.beginPath();
    let y = null;
    for (let index = first; index < end; index++) {
      const each = store.gauges.at(index);
      const x = Math.max(GUTTER, plot.x(each.time));
      if (y === null) g.moveTo(x, ground ?? place(each));
      else g.lineTo(x, y);
      y = place(each);
      g.lineTo(x, y);
    }
    g.lineTo(right, y);
    if (ground !== null) {
      g.lineTo(right, ground);
      g.fillStyle = colour;
      g.globalAlpha = 0.3;
      g.fill();
      g.globalAlpha = 1;
    }
    g.strokeStyle = colour;
    g.lineWidth = 1.5;
    g.stroke();
  }
}
