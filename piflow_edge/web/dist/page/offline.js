/** The service worker, by which the page works offline and may use several threads. */
/** Milliseconds to wait for the service worker; where it does not come, the page works without it. */
const PATIENCE = 4000;
const RELOADED = "reloaded for isolation";
/** Starts the service worker of this version, and returns once it answers for the page. */
export async function startOffline(site) {
    if (!navigator.serviceWorker)
        return;
    const controlled = new Promise((resolve) => {
        if (navigator.serviceWorker.controller)
            resolve();
        navigator.serviceWorker.addEventListener("controllerchange", () => resolve(), { once: true });
    });
    try {
        await navigator.serviceWorker.register(`service-worker.js?version=${site.version}`);
    }
    catch {
        return; // a browser that does not let it, such as in a private window
    }
    await Promise.race([controlled, new Promise((resolve) => setTimeout(resolve, PATIENCE))]);
    const canIsolate = navigator.serviceWorker.controller && !crossOriginIsolated && !sessionStorage.getItem(RELOADED);
    if (canIsolate) {
        sessionStorage.setItem(RELOADED, "yes");
        location.reload(); // the service worker gives the page the headers that threads need
        await new Promise(() => undefined);
    }
}
