import { createHash } from "node:crypto";
import { defineConfig, type Plugin } from "vite";

/** Makes files of the pictures that Pico has in its CSS as `data:` URLs, which the console's CSP does not allow. */
function picturesAsFiles(): Plugin {
  return {
    name: "pictures-as-files",
    enforce: "post",
    generateBundle(_, bundle) {
      for (const made of Object.values(bundle)) {
        if (made.type !== "asset" || !made.fileName.endsWith(".css")) continue;
        made.source = String(made.source).replace(/url\((["']?)data:image\/svg\+xml[^"')]*?,(.*?)\1\)/g, (_all, _quote, svg: string) => {
          const source = decodeURIComponent(svg);
          const fileName = `${createHash("sha256").update(source).digest("hex").slice(0, 8)}.svg`;
          this.emitFile({ type: "asset", fileName, source });
          return `url(${fileName})`;
        });
      }
    },
  };
}

export default defineConfig({
  // The function puts the path of the API in place of "/@base" (functions/serve_console/app.py): no build knows it.
  base: "/@base/console/",
  plugins: [picturesAsFiles()],
  build: {
    outDir: "../functions/serve_console/assets",
    emptyOutDir: true,
    assetsDir: ".",
    assetsInlineLimit: 0,
    modulePreload: false,
    target: "es2022",
  },
});
