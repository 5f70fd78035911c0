/** The generator an app embeds: a bundle, opened, that makes images. */
import { Bundle, type OpenOptions } from "./bundle.js";
import { type Asked } from "./conditioning.js";
import { type Seed } from "./noise.js";
import { type Pixels } from "./pictures/pixels.js";
import { type Recipe } from "./pictures/recipe.js";
import { type Solver } from "./policies/solvers.js";
import { type SessionOptions } from "./sessions.js";
export interface LoadOptions extends OpenOptions, SessionOptions {
    /** One of the bundle's; else its first. */
    precision?: string;
}
/** How far one batch of images is. */
export interface Progress {
    /** Network calls made, of `nfe`. */
    call: number;
    nfe: number;
    /** The noise level. */
    sigmaT: number;
    /** Number of the first of these images in the whole call. */
    first: number;
    /** Images as the policy now sees them: worked out when it is called, at no network call but the decoder's. */
    preview(): Promise<Image[]>;
}
/** How to sample; what is left out is the bundle's. */
export interface GenerateOptions {
    /** Of the noise: a whole number from 0 to 2^64 - 1; image i is number i of it. Or a pair (seed, index) for each image. */
    seed?: Seed | [Seed, Seed][];
    nfe?: number;
    substeps?: number;
    temperature?: number | "auto";
    h?: number | "inf";
    /**
     * "euler", as the student was trained, or "multistep", which ends some 1e-3 from there. It takes less time for policy
     * "gmk", and more for "gm", which is compiled.
     */
    solver?: Solver;
    /** Is awaited after every network call and its rollout. */
    onProgress?: (progress: Progress) => void | Promise<void>;
    /** Aborted, it ends the call with `Cancelled` before the next network call. */
    signal?: AbortSignal;
}
/** One image, and how to make it again. */
export declare class Image implements Pixels {
    private readonly pixels;
    readonly recipe?: Recipe | undefined;
    constructor(pixels: Pixels, recipe?: Recipe | undefined);
    get width(): number;
    get height(): number;
    get channels(): number;
    /** A byte for each channel of each pixel, row by row. */
    get data(): Uint8Array<ArrayBufferLike>;
    /** For a canvas. */
    toImageData(): ImageData;
    /** A PNG file that holds the recipe. */
    toPng(): Promise<Uint8Array<ArrayBuffer>>;
}
export interface Result {
    images: Image[];
    /** float32 for each image, (C, H, W). */
    latents: Float32Array[];
    /** Milliseconds of each stage. */
    timings: {
        noise: number;
        network: number;
        policy: number;
        decode: number;
        total: number;
    };
}
/** Open a bundle: the address of its folder on a web server or, in Node.js, its path. */
export declare function load(address: string | URL, options?: LoadOptions): Promise<Generator>;
/** What steers: a bare value is what the bundle is asked with: prompts, labels or a count. */
export type Subject = Asked | string | number | (string | number)[];
/** Makes images. One call at a time: ONNX Runtime runs one. */
export type Generator = ((subject: Subject, options?: GenerateOptions) => Promise<Result>) & {
    bundle: Bundle;
    /** Free the networks' memory. */
    close(): Promise<void>;
};
