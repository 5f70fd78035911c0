/** A bundle: `bundle.json`, and files that are handed out only after their checksum matched. */
export interface TensorSpec {
    name: string;
    dtype: string;
    shape: (number | string)[];
}
export interface NetworkSpec {
    inputs: TensorSpec[];
    outputs: TensorSpec[];
    files: Record<string, string[]>;
}
/** What of `bundle.json` is used here; `docs/export.md` says what it all means. */
export interface Manifest {
    format_version: number;
    name: string;
    policy: any;
    schedule: {
        nfe: number;
        shift: number;
        final_step_size_scale: number;
        total_substeps: number;
        h: number | string;
        temperature: number | string;
        /** Not in bundles of older releases, which rounded. */
        substep_rule?: "round" | "ceil";
    };
    conditioning: any;
    latent: {
        kind: "pixels" | "latents";
        shape: [number, number, number];
        scale: number;
        shift: number;
        mean: number[];
        deviation: number[];
        packing: number;
    };
    /** How long named axes may be. */
    axes: Record<string, {
        min: number;
        max: number | null;
        multiple_of: number;
    }>;
    networks: Record<string, NetworkSpec>;
    assets: Record<string, string>;
    precisions: string[];
    files: Record<string, {
        sha256: string;
        size: number;
    }>;
}
/** Name of the network that makes images of latents. */
export declare const DECODER = "decoder";
/** Height and width of the images; of a bundle that makes several sizes the usual one. */
export declare function imageSize({ networks, latent, axes }: Manifest): [number, number];
export interface OpenOptions {
    /** SHA-256 that `bundle.json` must have: then nobody but its maker can change the bundle. */
    sha256?: string;
}
export declare class Bundle {
    readonly manifest: Manifest;
    /** SHA-256 of `bundle.json`. */
    readonly sha256: string;
    private readonly readFile;
    private constructor();
    /** Read and check the manifest of a bundle; its files are checked when they are read. */
    static open(address: string | URL, options?: OpenOptions): Promise<Bundle>;
    /** The content of one file, after its size and hash matched the manifest. */
    read(name: string): Promise<Uint8Array>;
    /** A network's file, and the files that it keeps weights in, by their names. */
    readNetwork(name: string, precision: string): Promise<[Uint8Array, Record<string, Uint8Array>]>;
    /** The content of an asset, such as a tokenizer. */
    readAsset(name: string): Promise<Uint8Array>;
}
