// The steps as the page shows them: which of them, of which time, and the one that is chosen.

import { clock, count, duration, percent, several, shape, short } from "./format.js";
import { Gauges } from "./gauges.js";
import { palette } from "./plot.js";
import { Filter, Store, endOf } from "./store.js";
import { fillRequests, fillSteps } from "./tables.js";
import { TimeWindow, movesWindow } from "./time_window.js";
import { Timeline } from "./timeline.js";
import { Waterfall, inView } from "./waterfall.js";

const $ = (id) => document.getElementById(id);
const NAMED = 8; // requests that the words about a step name

export class StepsView {
  #live = new Store();
  #frozen = null; // a copy of it, while the page is paused
  #clockOffset = 0;
  #missed = 0;
  #chosen = null; // a step
  #frame = 0;
  #filter = new Filter();
  #colours = palette();

  /** `isMine(name)`: was it this page that sent a request of this name? */
  constructor(isMine) {
    this.isMine = isMine;
    this.window = new TimeWindow(() => this.changed());
    this.timeline = new Timeline($("timeline"));
    this.gauges = new Gauges($("gauges"), $("gauges-now"));
    this.waterfall = new Waterfall($("waterfall"), $("requests-note"));
    this.#wire();
    this.changed();
  }

  /** The number of the last step that is known. */
  get lastNumber() {
    return this.#live.steps.length ? this.#live.steps.at(-1).n : -1;
  }

  get isPaused() {
    return this.#frozen !== null;
  }

  get #shown() {
    return this.#frozen ?? this.#live;
  }

  /** Show what comes into a store from now on; `clockOffset` makes Unix time of its seconds. */
  look(store, clockOffset) {
    this.#live = store;
    this.#clockOffset = clockOffset;
    this.#missed = 0;
    if (!this.#frozen) {
      this.#chosen = null;
      this.describe(null);
    }
    this.heard();
  }

  /** The server left out so many steps, as the page did not keep up. */
  miss(number) {
    this.#missed += number;
  }

  /** Something has come. */
  heard() {
    if (this.#frozen) this.#note();
    else this.changed();
  }

  recolour() {
    this.#colours = palette();
    this.changed();
  }

  // What is drawn: at most once a frame, and only if something has changed and somebody can see it.

  changed() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const store = this.#shown;
    if (!this.#frozen) this.window.keepUp(store.latest);
    const drawn = {
      store,
      window: this.window,
      filter: this.#filter,
      clockOffset: store.latest ? this.#clockOffset : null, // before anything has happened there is no time
      colours: this.#colours,
      chosen: this.#chosen,
      isMine: this.isMine,
    };
    this.timeline.draw(drawn);
    this.gauges.draw(drawn);
    this.waterfall.draw(drawn);
    this.#total();
    this.#note();
    if ($("steps-table-box").open) fillSteps($("steps-table"), this.timeline.shown, (step) => this.choose(step));
    if ($("requests-table-box").open) {
      const requests = this.#filter.requests(inView(store, this.window));
      fillRequests($("requests-table"), requests, store.latest, (request) => this.filterBy(request.name));
    }
    $("follow").setAttribute("aria-pressed", String(this.window.follow));
  }

  #total() {
    const sums = { tokens: 0, padding: 0, proposed: 0, accepted: 0, eager: 0, device: 0 };
    const { shown } = this.timeline;
    for (const step of shown) {
      sums.tokens += step.tokens;
      sums.padding += step.padding;
      sums.proposed += step.proposed;
      sums.accepted += step.accepted;
      sums.eager += Number(step.reason !== null);
      sums.device += step.device_us ?? 0;
    }
    const span = shown.length ? endOf(shown.at(-1)) - shown[0].start : 0;
    const facts = [
      ["Steps in view", count(shown.length)],
      ["In a graph", percent(shown.length - sums.eager, shown.length)],
      ["Tokens", count(sums.tokens)],
      ["Padding", percent(sums.padding, sums.tokens + sums.padding)],
      ["Accepted", percent(sums.accepted, sums.proposed)],
      ["Device busy", span > 0 ? `${Math.min(100, sums.device / 1e4 / span).toFixed(0)} %` : "–"],
    ];
    const list = $("totals");
    facts.forEach(([name, value], index) => {
      const pair = list.children[index] ?? list.appendChild(document.createElement("div"));
      if (!pair.childElementCount) pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstElementChild.textContent = name;
      if (pair.lastElementChild.textContent !== value) pair.lastElementChild.textContent = value;
    });
  }

  #note() {
    const behind = this.#frozen ? this.#countSince() : 0;
    $("steps-note").textContent = [
      this.#frozen ? `paused${behind ? `, ${behind} new` : ""}` : null,
      `${count(this.#shown.steps.length)} kept`,
      this.#missed ? `${count(this.#missed)} missed, as this page was too slow` : null,
    ].filter(Boolean).join(" · ");
  }

  #countSince() {
    const [live, frozen] = [this.#live.steps, this.#frozen.steps];
    const last = frozen.length ? frozen.at(-1).n : -1;
    const since = live.length - live.firstFrom(last + 1, (step) => step.n);
    return since === live.capacity ? `${count(since)} or more` : since && count(since);
  }

  // What the user does.

  #wire() {
    const on = (id, kind, handle) => $(id).addEventListener(kind, handle);
    on("pause", "click", () => this.setPaused(!this.#frozen));
    on("follow", "click", () => this.setFollow(!this.window.follow));
    on("zoom-in", "click", () => this.window.zoom(0.5));
    on("zoom-out", "click", () => this.window.zoom(2));
    on("fit", "click", () => this.showAll());
    on("filter", "input", () => this.#setFilter());
    for (const chip of $("kinds").children) chip.addEventListener("click", () => this.#toggle(chip));
    for (const id of ["steps-table-box", "requests-table-box"]) on(id, "toggle", () => this.changed());
    new ResizeObserver(() => this.changed()).observe($("plots"));
    for (const [id, part] of [["timeline", this.timeline], ["gauges", this.gauges], ["waterfall", this.waterfall]]) {
      movesWindow($(id), this.window, (clientX) => part.plot.shareOf(clientX));
    }
    on("timeline", "pointermove", (event) => {
      if (event.buttons) return;
      const step = this.timeline.stepAt(event.offsetX);
      if (step) this.describe(step);
    });
    on("timeline", "pointerleave", () => this.describe(this.#chosen));
    on("timeline", "click", (event) => {
      if ($("timeline").dataset.dragged !== "true") this.choose(this.timeline.stepAt(event.offsetX));
    });
    on("timeline", "keydown", (event) => this.#timelineKey(event));
    on("waterfall", "pointermove", (event) => this.waterfall.tellOf(this.waterfall.requestAt(event.offsetX, event.offsetY)));
    on("waterfall", "pointerleave", () => this.waterfall.tellOf(null));
    on("waterfall", "click", (event) => {
      const request = this.waterfall.requestAt(event.offsetX, event.offsetY);
      if (request && $("waterfall").dataset.dragged !== "true") this.filterBy(this.#filter.text ? "" : request.name);
    });
  }

  #timelineKey(event) {
    const shown = this.timeline.shown ?? [];
    const step = { Home: shown[0], End: shown.at(-1) }[event.key];
    if (!step) return;
    event.preventDefault();
    this.choose(step, true);
  }

  neighbour(direction) {
    const { steps } = this.#shown;
    if (!steps.length) return null;
    const matches = this.#filter.forSteps(this.#shown);
    const shown = this.timeline.shown ?? [];
    if (!this.#chosen) return (direction > 0 ? shown[0] : shown.at(-1)) ?? null;
    let index = steps.firstFrom(this.#chosen.n, (step) => step.n) + direction;
    while (index >= 0 && index < steps.length && !matches(steps.at(index))) index += direction;
    return steps.at(Math.max(0, Math.min(steps.length - 1, index)));
  }

  choose(step, bringIntoView = false) {
    this.#chosen = step;
    if (step && bringIntoView) this.window.include(step.start);
    if (step && !this.#frozen && this.window.follow) this.window.setFollow(false); // it would run away
    this.describe(step);
    this.changed();
  }

  describe(step) {
    $("step-details").textContent = step
      ? this.#sentence(step)
      : "Point at a step, or choose one with ← and →.";
  }

  #sentence(step) {
    const requests = step.requests ?? [];
    const named = requests.slice(0, NAMED).map(([id, tokens]) => {
      const name = this.#shown.requests.get(id)?.name;
      return `${name ? short(name) : `#${id}`} ${count(tokens)}`;
    });
    return [
      `Step ${count(step.n)} at ${clock(step.start + this.#clockOffset, 3)}`,
      step.kind,
      step.graph === null ? `eager (${step.reason})` : `graph ${shape(step.graph)}`,
      `${several(step.tokens, "token")} in ${several(step.rows, "row")}, ${count(step.padding)} padding`,
      step.proposed > 0 ? `${count(step.accepted)} of ${several(step.proposed, "proposal")} accepted` : null,
      step.host_us == null ? null : `host ${duration(step.host_us / 1e6)}`,
      step.device_us == null ? null : `device ${duration(step.device_us / 1e6)}`,
      step.captured ? "its graph was captured now" : null,
      named.length ? `requests: ${named.join(", ")}${requests.length > NAMED ? ", …" : ""}` : null,
    ].filter(Boolean).join(" · ");
  }

  setPaused(paused) {
    this.#frozen = paused ? this.#live.copy() : null;
    $("pause").setAttribute("aria-pressed", String(paused));
    $("pause").textContent = paused ? "Go on" : "Pause";
    this.changed();
  }

  setFollow(follow) {
    if (follow) {
      this.#chosen = null;
      this.describe(null);
      if (this.#frozen) this.setPaused(false);
    }
    this.window.setFollow(follow);
  }

  showAll() {
    const { steps, latest } = this.#shown;
    if (steps.length) this.window.show(steps.at(0).start, Math.max(latest, endOf(steps.at(-1))));
  }

  filterBy(text) {
    $("filter").value = text;
    this.#setFilter();
    if (!text || !this.#shown.steps.length) return;
    const { steps } = this.#shown;
    const matches = this.#filter.forSteps(this.#shown);
    let [first, last] = [null, null];
    for (let index = 0; index < steps.length; index++) {
      if (!matches(steps.at(index))) continue;
      first ??= steps.at(index);
      last = steps.at(index);
    }
    if (first) this.window.show(first.start, endOf(last));
  }

  #toggle(chip) {
    const pressed = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(pressed));
    if (chip.dataset.kind === "eager only") this.#filter.eagerOnly = pressed;
    else if (pressed) this.#filter.hidden.delete(chip.dataset.kind);
    else this.#filter.hidden.add(chip.dataset.kind);
    this.changed();
  }

  #setFilter() {
    this.#filter.text = $("filter").value.trim().toLowerCase().replace("×", "x");
    this.changed();
  }
}
