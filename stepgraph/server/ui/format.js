// Numbers, times and text as people read them.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

export const count = (number) => (number == null ? "–" : WHOLE.format(number));

export const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(1)} %` : "–");

/** "1 step", "2 steps" */
export const several = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Three digits, and the unit that fits. */
export function duration(seconds) {
  if (seconds == null) return "–";
  const size = Math.abs(seconds);
  if (size === 0) return "0 ms";
  if (size < 0.001) return `${digits(seconds * 1e6)} µs`;
  if (size < 1) return `${digits(seconds * 1e3)} ms`;
  return size < 100 ? `${digits(seconds)} s` : `${WHOLE.format(seconds)} s`;
}

export function bytes(number) {
  if (number == null) return "–";
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (number >= size) return `${digits(number / size)} ${unit}`;
  }
  return `${number} B`;
}

function digits(number) {
  const size = Math.abs(Number(number.toPrecision(3))); // 99.99 is 100, not 100.0
  return number.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
}

/** Time of day. `fraction`: digits behind the seconds. */
export function clock(unixSeconds, fraction = 0) {
  const parts = Math.round(unixSeconds * 10 ** fraction);
  const date = new Date(Math.floor(parts / 10 ** fraction) * 1000);
  const two = (number) => String(number).padStart(2, "0");
  const whole = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  if (!fraction) return whole;
  return `${whole}.${String(parts % 10 ** fraction).padStart(fraction, "0")}`;
}

/** Enough of a request's name to tell it from others. */
export function short(name) {
  const [, prefix, id, suffix] = /^([a-z]+[-_])?([^-]*)(.*)$/s.exec(name);
  return id.length > 10 ? id.slice(0, 8) + suffix.slice(0, 4) : (prefix ?? "") + id + suffix.slice(0, 4);
}

/** A shape as the page writes it everywhere: tokens × rows. */
export const shape = (text) => (text == null ? "none" : String(text).replace("x", "×"));

/** Text whose control characters are shown, not obeyed: those of terminals, and those that turn the direction of what follows. */
export function printable(text) {
  return text.replace(CONTROLS, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return code === 0x7f ? "␡" : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}
