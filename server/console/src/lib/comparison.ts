// A comparison of the playground as a link: who answers, the prompt and the settings. Images stay out.

import type { Settings, Who } from "./lane.svelte";

type Comparison = { lanes: Who[]; settings: Partial<Settings> };

const FIELD = "comparison";

export function linkTo(lanes: Who[], settings: Settings): string {
  const { images: _, followUp: __, ...kept } = settings;
  const field = encodeURIComponent(JSON.stringify({ lanes, settings: kept }));
  return `${location.origin}${location.pathname}#/playground?${FIELD}=${field}`;
}

/** The comparison in the address, or null if there is none that can be read. */
export function comparisonIn(hash: string): Comparison | null {
  try {
    const read = JSON.parse(new URLSearchParams(hash.split("?")[1] ?? "").get(FIELD) ?? "null") as Comparison | null;
    return read && Array.isArray(read.lanes) && read.lanes.length ? read : null;
  } catch {
    return null;
  }
}
