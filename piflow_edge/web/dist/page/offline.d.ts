/** The service worker, by which the page works offline and may use several threads. */
import type { Site } from "./site.js";
/** Starts the service worker of this version, and returns once it answers for the page. */
export declare function startOffline(site: Site): Promise<void>;
