// Opens a page in Chromium and does what a test says: steps as JSON on stdin, what was seen as JSON on stdout.
import { readFileSync } from "node:fs";
import { chromium } from "../../piflow_edge/web/node_modules/playwright-core/index.mjs";

const FLAGS = [
  "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
  "--disable-sync",
]; // prettier-ignore
const { program, profile, url, steps, viewport, flags = [] } = JSON.parse(readFileSync(0, "utf-8"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: program, args: [...FLAGS, ...flags], viewport: viewport ?? { width: 1000, height: 800 }, acceptDownloads: true,
}); // prettier-ignore
const page = context.pages()[0] ?? (await context.newPage());
const errors = [];
const asked = [];
page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
page.on("pageerror", (error) => errors.push(error.message));
context.on("request", (request) => asked.push(request.url()));
const saw = [];

const STEPS = {
  open: async () => page.goto(url),
  // The picture's pixels, and what stands beside it.
  read: async () =>
    saw.push(
      await page.evaluate(() => {
        const canvas = document.getElementById("picture");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const rows = [...document.querySelectorAll("#timings tr")].map((row) => [row.cells[0].textContent, Number(row.cells[1].textContent)]);
        return {
          size: [canvas.width, canvas.height], pixels: [...data], status: document.getElementById("status").textContent,
          label: canvas.getAttribute("aria-label"), timings: Object.fromEntries(rows), isIsolated: crossOriginIsolated,
          focus: document.activeElement.id, wide: document.documentElement.scrollWidth > innerWidth,
        };
      }),
    ),
  wait: async ({ text, seconds = 60 }) =>
    page.waitForFunction((text) => new RegExp(text).test(document.getElementById("status").textContent), text, { timeout: 1000 * seconds }),
  choose: async ({ id, title }) => page.selectOption(`#${id}`, { label: title }),
  fill: async ({ id, text }) => page.fill(`#${id}`, text),
  click: async ({ id }) => page.click(`#${id}`),
  press: async ({ key }) => page.keyboard.press(key),
  focus: async ({ id }) => page.focus(`#${id}`),
  shoot: async ({ file }) => page.screenshot({ path: file, fullPage: true }),
  offline: async () => context.setOffline(true),
  download: async ({ file }) => {
    const [download] = await Promise.all([page.waitForEvent("download"), page.click("#download")]);
    await download.saveAs(file);
  },
};
try {
  for (const { step, ...given } of steps) await STEPS[step](given);
} catch (error) {
  const status = await page.evaluate(() => document.getElementById("status")?.textContent).catch(() => null);
  errors.push(`${error.message}; the status is ${status}`);
}
await context.close();
process.stdout.write(JSON.stringify({ saw, errors, asked }));
