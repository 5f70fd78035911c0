/** The page: a form, and what became of it. */

import { Cancelled } from "../errors.js";
import { KeyNeeded, openInBrowser, openOnServer } from "./drawers.js";
import { startOffline } from "./offline.js";
import type { Drawer, Drawn, Picture, Site } from "./site.js";

interface Place {
  title: string;
  open(bundle: { name: string; path: string }): Promise<[Drawer, number]>;
}

const $ = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const form = $<HTMLFormElement>("form");
const seed = $<HTMLInputElement>("seed");
const nfe = $<HTMLInputElement>("nfe");
const stop = $<HTMLButtonElement>("stop");
const drawButton = $<HTMLButtonElement>("draw");
const link = $<HTMLAnchorElement>("download");
const bundleChoice = $<HTMLSelectElement>("bundle");
const placeChoice = $<HTMLSelectElement>("place");

let site: Site;
let places: Place[];
let conditioning: any;
let drawer: Drawer | null = null;
let abort: AbortController | null = null;

async function start(): Promise<void> {
  const address = (path: string) => new URL(path, location.href).href;
  site = await (await fetch("site.json", { cache: "no-cache" })).json();
  await startOffline(site);
  places = [];
  if (site.has_server) places.push({ title: "on the server", open: async ({ name }) => [openOnServer(name, fieldOf(conditioning), readKey), 0] });
  if (site.ort !== null) {
    const ort = address(site.ort);
    const inBrowser = (provider: string) => (bundle: { path: string }) => openInBrowser(address(bundle.path), ort, provider);
    places.push({ title: "in this browser (WebAssembly)", open: inBrowser("wasm") });
    if ("gpu" in navigator) places.push({ title: "in this browser (WebGPU)", open: inBrowser("webgpu") });
  }
  fill(bundleChoice, site.bundles.map((bundle) => bundle.name));
  fill(placeChoice, places.map((place) => place.title));
  $("bundle-row").hidden = site.bundles.length < 2;
  bundleChoice.addEventListener("change", () => void run(openBundle));
  placeChoice.addEventListener("change", () => void run(openPlace));
  await openBundle();
}

/** Shows what a bundle is asked with, and opens it. */
async function openBundle(): Promise<void> {
  const { path } = site.bundles[bundleChoice.selectedIndex];
  const manifest = await (await fetch(`${path}/bundle.json`)).json();
  conditioning = manifest.conditioning;
  nfe.value = manifest.schedule.nfe;
  $("subject-row").hidden = conditioning.kind === "none";
  $("subject-slot").replaceChildren(buildSubject());
  await openPlace();
}

/** Opens the bundle where it is to be drawn. */
async function openPlace(): Promise<void> {
  drawer?.close();
  drawer = null;
  drawButton.disabled = true;
  say("Loading the model.");
  const place = places[placeChoice.selectedIndex];
  const [opened, ms] = await place.open(site.bundles[bundleChoice.selectedIndex]);
  drawer = opened;
  drawButton.disabled = false;
  $("where").textContent = place.title;
  say(ms ? `Ready after ${Math.round(ms)} ms.` : "Ready.");
}

const FIELDS: Record<string, string> = { class: "labels", text: "prompt", none: "count" };
const fieldOf = (described: any) => FIELDS[described.kind];

/** A list of classes or a box for a prompt. */
function buildSubject(): HTMLElement {
  if (conditioning.kind === "class") {
    const select = document.createElement("select");
    select.id = "subject";
    fill(select, conditioning.names);
    return select;
  }
  const area = document.createElement("textarea");
  area.id = "subject";
  area.rows = 3;
  area.value = conditioning.examples?.[0] ?? "";
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return area;
}

function readSubject(): string | number {
  if (conditioning.kind === "none") return 1;
  const field = $<HTMLSelectElement | HTMLTextAreaElement>("subject");
  return field instanceof HTMLSelectElement ? field.selectedIndex : field.value;
}

async function draw(): Promise<void> {
  if (drawer === null || abort !== null) return;
  abort = new AbortController();
  setBusy(true);
  const began = performance.now();
  const wish = { subject: readSubject(), seed: Number(seed.value), nfe: Number(nfe.value) };
  const bar = $<HTMLProgressElement>("progress");
  bar.max = wish.nfe;
  bar.value = 0;
  say("Drawing.");
  try {
    const drawn = await drawer.draw(
      wish,
      ({ call, nfe, preview }) => {
        bar.value = call;
        say(`Network call ${call} of ${nfe}.`);
        if (preview) show(preview, "a preview");
      },
      abort.signal,
    );
    finish(drawn, wish, performance.now() - began);
  } finally {
    abort = null;
    setBusy(false);
  }
}

function finish({ picture, file, timings }: Drawn, wish: { subject: string | number; seed: number }, ms: number): void {
  show(picture, `the picture of ${wish.subject}, seed ${wish.seed}`);
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(file);
  link.download = `${site.bundles[bundleChoice.selectedIndex].name}-${wish.seed}.png`;
  link.hidden = false;
  const rows = Object.entries({ ...timings, "on this page": ms }).map(([stage, time]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = stage;
    row.append(head, document.createElement("td"));
    row.cells[1].textContent = time.toFixed(1);
    return row;
  });
  $("timings").querySelector("tbody")?.replaceChildren(...rows);
  $("timings").hidden = false;
  say(`Done in ${Math.round(ms)} ms.`);
}

function show({ width, height, rgba }: Picture, what: string): void {
  const canvas = $<HTMLCanvasElement>("picture");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d")?.putImageData(new ImageData(rgba, width, height), 0, 0);
  canvas.setAttribute("aria-label", what);
}

function setBusy(isBusy: boolean): void {
  drawButton.disabled = isBusy;
  stop.disabled = !isBusy;
}

function say(text: string, isFailed = false): void {
  $("status").textContent = text;
  $("status").toggleAttribute("data-failed", isFailed);
}

/** Runs something of the page; what goes wrong is said. */
async function run(work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    const isStopped = error instanceof Cancelled || (error as Error).name === "AbortError";
    if (error instanceof KeyNeeded) $("key-row").hidden = false;
    say(isStopped ? "Stopped." : (error as Error).message, !isStopped);
  }
}

function readKey(): string {
  return $<HTMLInputElement>("key").value.trim();
}

function fill(select: HTMLSelectElement, titles: string[]): void {
  select.replaceChildren(...titles.map((title) => new Option(title)));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void run(draw);
});
stop.addEventListener("click", () => abort?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") abort?.abort();
});
$("new-seed").addEventListener("click", () => {
  seed.value = String(Math.floor(Math.random() * 1e9));
  void run(draw);
});
void run(start);
