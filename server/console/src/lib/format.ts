// Numbers and names as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(n: number | null | undefined): string {
  if (n === null || n === undefined) return "–";
  let unit = 0;
  while (n >= 1024 && unit < UNITS.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit && n < 10 ? n.toFixed(1) : Math.round(n)} ${UNITS[unit]}`;
}

export function seconds(s: number | null | undefined): string {
  if (s === null || s === undefined) return "–";
  if (s < 0.0995) return `${(s * 1000).toFixed(s < 0.00995 ? 1 : 0)} ms`;
  if (s < 99.5) return `${s.toPrecision(3)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : `${Math.round(s / 3600)} h`;
}

export function rate(n: number): string {
  return n < 10 ? n.toFixed(1) : String(Math.round(n));
}

/** 12,345 */
export function count(n: number): string {
  return n.toLocaleString("en");
}

export function clock(epoch: number): string {
  return new Date(epoch * 1000).toLocaleTimeString();
}

/** `pirate@3fa9c1…` without the digest. */
export function plainName(adapter: string | null): string {
  return adapter === null ? "none" : (adapter.split("@")[0] ?? adapter);
}

/** The same colour for the same adapter, everywhere; the base is grey. */
export function colour(adapter: string | null): string {
  const name = plainName(adapter);
  if (adapter === null || name === "base") return "var(--muted)";
  let hash = 0x811c9dc5; // FNV-1a: names that are alike get other hues
  for (const char of name) hash = Math.imul(hash ^ char.charCodeAt(0), 0x01000193) >>> 0;
  return `oklch(var(--lightness) 0.14 ${hash % 360})`;
}
