/** Latents -> the pixels of images, as `piflow_edge/runtime/images.py` makes them. */
import type { Manifest } from "../bundle.js";
/** An image: `data` has a byte for each channel of each pixel, row by row. */
export interface Pixels {
    width: number;
    height: number;
    channels: number;
    data: Uint8Array;
}
/** What the decoder takes, or the pixels from -1 to 1, of states (B, C, H, W). */
export declare function restore(states: Float32Array, latent: Manifest["latent"]): {
    data: Float32Array;
    shape: number[];
};
/** Values from -1 to 1, (B, C, H, W), as images. */
export declare function toPixels(values: Float32Array, [batch, channels, height, width]: number[]): Pixels[];
/** Pixels as a canvas takes them. */
export declare function toRGBA({ channels, data }: Pixels): Uint8ClampedArray<ArrayBuffer>;
