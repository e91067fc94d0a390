// What the page knows of one engine. Everything is bounded: a page that is left open for a week holds no more than one of an hour.

export const MAX_STEPS = 10_000;
const MAX_GAUGES = 6_000;
const MAX_REQUESTS = 2_000;

/** The last `capacity` things, oldest first. */
export class Ring {
  #items = [];
  #start = 0;

  constructor(capacity) {
    this.capacity = capacity;
  }

  get length() {
    return this.#items.length;
  }

  push(item) {
    if (this.#items.length < this.capacity) {
      this.#items.push(item);
    } else {
      this.#items[this.#start] = item;
      this.#start = (this.#start + 1) % this.capacity;
    }
  }

  /** The thing at `index`, counted from the oldest, or from the newest if it is negative. */
  at(index) {
    const length = this.#items.length;
    return this.#items[(this.#start + (index < 0 ? index + length : index)) % length];
  }

  copy() {
    const copy = new Ring(this.capacity);
    copy.#items = this.#items.slice();
    copy.#start = this.#start;
    return copy;
  }

  /** Index of the first thing whose `place(thing)` is at least `value`; things are in this order. */
  firstFrom(value, place) {
    let low = 0;
    let high = this.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (place(this.at(middle)) < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

/** When a step was done, in the engine's seconds. */
export const endOf = (step) => step.start + (step.device_us ?? 0) / 1e6;

export class Store {
  steps = new Ring(MAX_STEPS);
  gauges = new Ring(MAX_GAUGES);
  requests = new Map(); // by id, in the order in which they were first heard of
  latest = 0; // the last moment at which anything happened, in the engine's seconds

  addSteps(steps) {
    for (const step of steps) {
      this.steps.push(step);
      this.latest = Math.max(this.latest, endOf(step));
    }
  }

  addRequests(requests) {
    for (const request of requests) {
      this.requests.set(request.id, request);
      this.latest = Math.max(this.latest, request.arrived ?? 0, request.finished ?? 0);
    }
    for (const id of this.requests.keys()) {
      if (this.requests.size <= MAX_REQUESTS) break;
      this.requests.delete(id);
    }
  }

  /** Gauges that say the same as the last ones are not kept: an idle engine is one line, however long. Nor is it something that
   * happened when they are heard of for the first time. */
  addGauges(gauges) {
    const last = this.gauges.length ? this.gauges.at(-1) : null;
    const same = (name) => last[name] === gauges[name];
    if (last && ["running", "waiting", "kv_used", "kv_total"].every(same)) return false;
    this.gauges.push(gauges);
    if (last) this.latest = Math.max(this.latest, gauges.time ?? 0);
    return true;
  }

  /** Index of the first step that ends at `time` or later. */
  firstStepFrom(time) {
    return this.steps.firstFrom(time, endOf);
  }

  /** The same as it is now, for a view that is paused. */
  copy() {
    const copy = new Store();
    copy.steps = this.steps.copy();
    copy.gauges = this.gauges.copy();
    copy.requests = new Map(this.requests);
    copy.latest = this.latest;
    return copy;
  }
}

/** Which steps and requests are shown. */
export class Filter {
  hidden = new Set(); // kinds
  eagerOnly = false;
  text = "";

  /** The requests that are named so, or all, if none is: then the text means graphs or reasons. */
  requests(all) {
    const named = this.text ? all.filter((request) => this.#names(request.name)) : [];
    return named.length ? named : all;
  }

  /** A function that tells whether a step is shown. */
  forSteps(store) {
    const ids = new Set();
    if (this.text) for (const [id, { name }] of store.requests) if (this.#names(name)) ids.add(id);
    return (step) => {
      if (this.hidden.has(step.kind) || (this.eagerOnly && step.reason === null)) return false;
      if (!this.text || this.#names(step.graph) || this.#names(step.reason)) return true;
      return ids.size > 0 && (step.requests ?? []).some(([id]) => ids.has(id));
    };
  }

  #names(text) {
    return text != null && text.toLowerCase().includes(this.text);
  }

  get isOn() {
    return this.hidden.size > 0 || this.eagerOnly || this.text !== "";
  }
}
