// Times a bundle's first and later pictures in Chromium; benchmarks/browser.py says what. JSON on stdin and stdout.
import { readFileSync } from "node:fs";
import { chromium } from "../piflow_edge/web/node_modules/playwright-core/index.mjs";

const { program, profile, url, contenders, subject, images, flags } = JSON.parse(readFileSync(0, "utf-8"));
const context = await chromium.launchPersistentContext(profile, { executablePath: program, args: flags });
const found = {};
for (const [name, { build, provider, threads }] of Object.entries(contenders)) {
  const page = await context.newPage();
  await page.goto(url);
  found[name] = await page.evaluate(measure, { build, provider, threads, subject, images }).catch((error) => ({ error: error.message.split("\n")[0] }));
  await page.close();
}
const version = context.browser()?.version() ?? (await (await context.newPage()).evaluate(() => navigator.userAgent));
await context.close();
process.stdout.write(JSON.stringify({ version, found }));

async function measure({ build, provider, threads, subject, images }) {
  const at = (path) => new URL(path, location.href).href;
  const began = performance.now();
  const ort = await import(at(`ort/${build}`));
  ort.env.wasm.numThreads = threads;
  const { load } = await import(at("piflow/index.js"));
  const generator = await load(at("bundles/0"), { ort, executionProviders: [provider] });
  const loaded = performance.now();
  const first = await generator([subject], { seed: 0 });
  const drawn = performance.now();
  const rows = [];
  for (let seed = 1; seed <= images; seed++) rows.push((await generator([subject], { seed })).timings);
  const median = (stage) => rows.map((row) => row[stage]).sort((a, b) => a - b)[Math.floor(rows.length / 2)];
  return {
    load_ms: loaded - began,
    first_ms: drawn - loaded,
    image_ms: median("total"),
    network_ms: median("network"),
    policy_ms: median("policy"),
    isolated: crossOriginIsolated,
    pixels: [...first.images[0].data],
  };
}
