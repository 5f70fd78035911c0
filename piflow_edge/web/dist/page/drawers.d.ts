/** The two that draw: this browser, in a worker, and the server that the page came from. */
import type { Drawer } from "./site.js";
/** What goes wrong where a server wants a key. */
export declare class KeyNeeded extends Error {
}
/** A worker with an opened bundle. `provider`: of ONNX Runtime, "wasm" or "webgpu". */
export declare function openInBrowser(bundle: string, ort: string, provider: string): Promise<[Drawer, number]>;
/** `piflow-edge serve`. `field`: of its native endpoint that says what to draw. `readKey`: the key that it wants, if any. */
export declare function openOnServer(bundle: string, field: string, readKey: () => string): Drawer;
