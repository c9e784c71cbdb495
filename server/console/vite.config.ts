import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [svelte()],
  base: "/console/",
  build: {
    outDir: "../loraplex_server/console",
    emptyOutDir: true,
    modulePreload: false,
    assetsInlineLimit: 0, // the content policy allows no data: URLs
    rollupOptions: {
      output: { // one file of each kind, always under the same name: a change is a small diff
        entryFileNames: "console.js",
        assetFileNames: "console[extname]",
      },
    },
  },
  server: { proxy: { "/v1": "http://127.0.0.1:8000", "/health": "http://127.0.0.1:8000" } },
});
