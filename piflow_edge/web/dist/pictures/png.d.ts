/** PNG files that hold the recipe of their image, as `piflow-edge sample` writes them. */
import type { Pixels } from "./pixels.js";
/** The image as a PNG file. `recipe`: JSON in ASCII, which `piflow-edge sample --like` reads. */
export declare function encodePng(image: Pixels, recipe?: string): Promise<Uint8Array<ArrayBuffer>>;
