// The span of time that all plots show, and the ways to move it.

const SHORTEST_S = 0.002;
const LONGEST_S = 24 * 3600;
const FIRST_S = 10;

export class TimeWindow {
  follow = true;
  span = FIRST_S;
  to = 0;

  /** `onChange()` is called after every move. */
  constructor(onChange) {
    this.onChange = onChange;
  }

  get from() {
    return this.to - this.span;
  }

  /** Keep up with what happens, if that is wanted. */
  keepUp(latest) {
    if (this.follow) this.to = latest + this.span * 0.02;
  }

  /** Make the span longer (`factor` above 1) or shorter around a moment, or around the end while it keeps up. */
  zoom(factor, around = null) {
    const fixed = around ?? (this.follow ? this.to : this.from + this.span / 2);
    const span = Math.min(LONGEST_S, Math.max(SHORTEST_S, this.span * factor));
    this.to = fixed + ((this.to - fixed) * span) / this.span;
    this.span = span;
    this.onChange();
  }

  /** Move by a share of the span; positive is later. */
  pan(share) {
    this.follow = false;
    this.to += share * this.span;
    this.onChange();
  }

  /** Show all from one moment to another. */
  show(from, to) {
    this.follow = false;
    this.span = Math.min(LONGEST_S, Math.max(SHORTEST_S, (to - from) * 1.04));
    this.to = to + (this.span - (to - from)) / 2;
    this.onChange();
  }

  /** Have a moment in view. */
  include(time) {
    if (time >= this.from && time <= this.to) return;
    this.follow = false;
    this.to = time + this.span / 2;
    this.onChange();
  }

  setFollow(follow) {
    this.follow = follow;
    this.onChange();
  }
}

/** Have a plot move the window: drag, Ctrl and wheel, sideways wheel, double click. `place(clientX)` is the share of its width. */
export function movesWindow(element, window_, place) {
  let dragged = null;
  element.addEventListener("pointerdown", (event) => {
    if (event.button === 0) dragged = { x: event.clientX, moved: false };
  });
  element.addEventListener("pointermove", (event) => {
    if (!dragged || !(event.buttons & 1)) return;
    const share = place(dragged.x) - place(event.clientX);
    if (!dragged.moved && Math.abs(event.clientX - dragged.x) < 4) return; // a click with an unsteady hand
    if (!dragged.moved) element.setPointerCapture(event.pointerId);
    dragged = { x: event.clientX, moved: true };
    window_.pan(share);
  });
  element.addEventListener("pointerup", () => {
    element.dataset.dragged = String(dragged?.moved ?? false); // a drag is no click
    dragged = null;
  });
  element.addEventListener(
    "wheel",
    (event) => {
      const moment = window_.from + place(event.clientX) * window_.span;
      if (event.ctrlKey || event.metaKey) window_.zoom(Math.exp(event.deltaY * 0.004), window_.follow ? null : moment);
      else if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) window_.pan(event.deltaX / 1000);
      else return; // the page scrolls
      event.preventDefault();
    },
    { passive: false },
  );
  element.addEventListener("dblclick", (event) => {
    const moment = window_.from + place(event.clientX) * window_.span;
    window_.follow = false;
    window_.zoom(0.5, moment);
  });
}
