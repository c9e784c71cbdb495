import { onDestroy } from "svelte";

/** Looks now, and again every `ms` while the component is there and seen. Called while it is set up. */
export function poll(look: () => Promise<void>, ms: number): void {
  void look();
  const timer = setInterval(() => {
    if (!document.hidden) void look();
  }, ms);
  onDestroy(() => clearInterval(timer));
}
