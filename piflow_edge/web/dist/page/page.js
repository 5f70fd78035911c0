/** The page: a form, and what became of it. */
import { Cancelled } from "../errors.js";
import { KeyNeeded, openInBrowser, openOnServer } from "./drawers.js";
import { startOffline } from "./offline.js";
const $ = (id) => document.getElementById(id);
const form = $("form");
const seed = $("seed");
const nfe = $("nfe");
const stop = $("stop");
const drawButton = $("draw");
const link = $("download");
const bundleChoice = $("bundle");
const placeChoice = $("place");
let site;
let places;
let conditioning;
let drawer = null;
let abort = null;
async function start() {
    const address = (path) => new URL(path, location.href).href;
    site = await (await fetch("site.json", { cache: "no-cache" })).json();
    await startOffline(site);
    places = [];
    if (site.has_server)
        places.push({ title: "on the server", open: async ({ name }) => [openOnServer(name, fieldOf(conditioning), readKey), 0] });
    if (site.ort !== null) {
        const ort = address(site.ort);
        const inBrowser = (provider) => (bundle) => openInBrowser(address(bundle.path), ort, provider);
        places.push({ title: "in this browser (WebAssembly)", open: inBrowser("wasm") });
        if ("gpu" in navigator)
            places.push({ title: "in this browser (WebGPU)", open: inBrowser("webgpu") });
    }
    fill(bundleChoice, site.bundles.map((bundle) => bundle.name));
    fill(placeChoice, places.map((place) => place.title));
    $("bundle-row").hidden = site.bundles.length < 2;
    bundleChoice.addEventListener("change", () => void run(openBundle));
    placeChoice.addEventListener("change", () => void run(openPlace));
    await openBundle();
}
/** Shows what a bundle is asked with, and opens it. */
async function openBundle() {
    const { path } = site.bundles[bundleChoice.selectedIndex];
    const manifest = await (await fetch(`${path}/bundle.json`)).json();
    conditioning = manifest.conditioning;
    nfe.value = manifest.schedule.nfe;
    $("subject-row").hidden = conditioning.kind === "none";
    $("subject-slot").replaceChildren(buildSubject());
    await openPlace();
}
/** Opens the bundle where it is to be drawn. */
async function openPlace() {
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
const FIELDS = { class: "labels", text: "prompt", none: "count" };
const fieldOf = (described) => FIELDS[described.kind];
/** A list of classes or a box for a prompt. */
function buildSubject() {
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
function readSubject() {
    if (conditioning.kind === "none")
        return 1;
    const field = $("subject");
    return field instanceof HTMLSelectElement ? field.selectedIndex : field.value;
}
async function draw() {
    if (drawer === null || abort !== null)
        return;
    abort = new AbortController();
    setBusy(true);
    const began = performance.now();
    const wish = { subject: readSubject(), seed: Number(seed.value), nfe: Number(nfe.value) };
    const bar = $("progress");
    bar.max = wish.nfe;
    bar.value = 0;
    say("Drawing.");
    try {
        const drawn = await drawer.draw(wish, ({ call, nfe, preview }) => {
            bar.value = call;
            say(`Network call ${call} of ${nfe}.`);
            if (preview)
                show(preview, "a preview");
        }, abort.signal);
        finish(drawn, wish, performance.now() - began);
    }
    finally {
        abort = null;
        setBusy(false);
    }
}
function finish({ picture, file, timings }, wish, ms) {
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
function show({ width, height, rgba }, what) {
    const canvas = $("picture");
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d")?.putImageData(new ImageData(rgba, width, height), 0, 0);
    canvas.setAttribute("aria-label", what);
}
function setBusy(isBusy) {
    drawButton.disabled = isBusy;
    stop.disabled = !isBusy;
}
function say(text, isFailed = false) {
    $("status").textContent = text;
    $("status").toggleAttribute("data-failed", isFailed);
}
/** Runs something of the page; what goes wrong is said. */
async function run(work) {
    try {
        await work();
    }
    catch (error) {
        const isStopped = error instanceof Cancelled || error.name === "AbortError";
        if (error instanceof KeyNeeded)
            $("key-row").hidden = false;
        say(isStopped ? "Stopped." : error.message, !isStopped);
    }
}
function readKey() {
    return $("key").value.trim();
}
function fill(select, titles) {
    select.replaceChildren(...titles.map((title) => new Option(title)));
}
form.addEventListener("submit", (event) => {
    event.preventDefault();
    void run(draw);
});
stop.addEventListener("click", () => abort?.abort());
document.addEventListener("keydown", (event) => {
    if (event.key === "Escape")
        abort?.abort();
});
$("new-seed").addEventListener("click", () => {
    seed.value = String(Math.floor(Math.random() * 1e9));
    void run(draw);
});
void run(start);
