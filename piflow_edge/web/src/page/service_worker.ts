/**
 * Keeps the page's files for use offline, and gives every answer the headers by which a page is isolated from others:
 * without them a browser lets WebAssembly have no threads.
 */

const worker = self as unknown as {
  addEventListener(name: string, listen: (event: any) => void): void;
  skipWaiting(): Promise<void>;
  clients: { claim(): Promise<void> };
  registration: { scope: string };
};
const VERSION = new URL(location.href).searchParams.get("version");
const CACHE = `piflow-edge ${VERSION}`;
/** What is not kept: it is the server's work, or says what is new. */
const LIVE = /^(v1\/|metrics$|healthz$|site\.json$)/;

worker.addEventListener("install", (event) => event.waitUntil(keepFiles().then(() => worker.skipWaiting())));
worker.addEventListener("activate", (event) => event.waitUntil(forgetOthers().then(() => worker.clients.claim())));
worker.addEventListener("fetch", (event) => {
  const { request } = event as { request: Request };
  const path = request.url.startsWith(worker.registration.scope) ? request.url.slice(worker.registration.scope.length) : null;
  if (path === null || request.method !== "GET" || /^v1\//.test(path)) return;
  event.respondWith((LIVE.test(path) ? askFirst(request) : takeKept(request)).then(isolate));
});

async function keepFiles(): Promise<void> {
  const answer = await fetch("site.json", { cache: "no-cache" });
  const cache = await caches.open(CACHE);
  await cache.put("site.json", answer.clone());
  const { files } = (await answer.json()) as { files: string[] };
  await cache.addAll(files.map((file) => new Request(file, { cache: "no-cache" })));
}

async function forgetOthers(): Promise<void> {
  for (const name of await caches.keys()) if (name !== CACHE) await caches.delete(name);
}

/** From the cache, else from the network, and then kept. */
async function takeKept(request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request, { ignoreSearch: true });
  if (kept) return kept;
  const answer = await fetch(request);
  if (answer.ok && answer.status === 200) await cache.put(request, answer.clone());
  return answer;
}

/** From the network, or offline what was kept last. */
async function askFirst(request: Request): Promise<Response> {
  try {
    return await fetch(request);
  } catch (error) {
    const kept = await caches.match(request);
    if (kept) return kept;
    throw error;
  }
}

function isolate(answer: Response): Response {
  if (answer.status === 0) return answer;
  const headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers });
}

