/** Latents -> the pixels of images, as `piflow_edge/runtime/images.py` makes them. */

import type { Manifest } from "../bundle.js";
import { roundHalfToEven } from "../schedule.js";

/** An image: `data` has a byte for each channel of each pixel, row by row. */
export interface Pixels {
  width: number;
  height: number;
  channels: number;
  data: Uint8Array;
}

/** What the decoder takes, or the pixels from -1 to 1, of states (B, C, H, W). */
export function restore(states: Float32Array, latent: Manifest["latent"]): { data: Float32Array; shape: number[] } {
  const [channels, height, width] = latent.shape;
  const { packing, scale, shift } = latent;
  const pixels = height * width;
  const batch = states.length / (channels * pixels);
  const outChannels = channels / packing ** 2;
  const data = new Float32Array(states.length);
  for (let i = 0; i < states.length; i++) {
    const c = Math.floor(i / pixels) % channels;
    let value = Math.fround(Math.fround(states[i] / scale) + shift);
    if (latent.mean.length) value = Math.fround(Math.fround(value * latent.deviation[c]) + latent.mean[c]);
    data[packing === 1 ? i : unpackIndex(i, latent.shape, packing)] = value;
  }
  return { data, shape: [batch, outChannels, height * packing, width * packing] };
}

/** Where a value goes when each packing^2 channels become a square of one channel. */
function unpackIndex(index: number, [channels, height, width]: number[], packing: number): number {
  const x = index % width;
  const y = Math.floor(index / width) % height;
  const c = Math.floor(index / (width * height)) % channels;
  const b = Math.floor(index / (width * height * channels));
  const outChannels = channels / packing ** 2;
  const outChannel = b * outChannels + Math.floor(c / packing ** 2);
  const outRow = y * packing + (Math.floor(c / packing) % packing);
  return (outChannel * height * packing + outRow) * width * packing + x * packing + (c % packing);
}

/** Values from -1 to 1, (B, C, H, W), as images. */
export function toPixels(values: Float32Array, [batch, channels, height, width]: number[]): Pixels[] {
  return Array.from({ length: batch }, (_, b) => {
    const data = new Uint8Array(channels * height * width);
    for (let c = 0; c < channels; c++) {
      for (let i = 0; i < height * width; i++) {
        const value = Math.fround(Math.fround(values[(b * channels + c) * height * width + i] + 1) * 127.5);
        data[i * channels + c] = roundHalfToEven(Math.min(Math.max(value, 0), 255));
      }
    }
    return { width, height, channels, data };
  });
}

/** Pixels as a canvas takes them. */
export function toRGBA({ channels, data }: Pixels): Uint8ClampedArray<ArrayBuffer> {
  const count = data.length / channels;
  const rgba = new Uint8ClampedArray(4 * count);
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) rgba[4 * i + c] = data[i * channels + (channels === 1 ? 0 : c)];
    rgba[4 * i + 3] = 255;
  }
  return rgba;
}
