/** What steers an image: classes, prompts or nothing. One registry, as in `piflow_edge/conditioning`. */
import type { Bundle } from "./bundle.js";
import type { Arrays } from "./sessions.js";
/** What a caller asks for: exactly one of these. */
export interface Asked {
    /** Class ids or names, one image each. */
    labels?: number | string | (number | string)[];
    /** Texts, one image each. */
    prompts?: string | string[];
    /** Images in all, where nothing steers. */
    count?: number;
}
export interface Conditioner {
    /** The field of `Asked` that a bare first argument fills. */
    positional: "labels" | "prompts" | "count";
    /** The network's inputs, and what steers each image as a recipe holds it. */
    encode(asked: Asked): Promise<{
        arrays: Arrays;
        descriptions: object[];
    }>;
}
/** One call of a network of the bundle, by its name. */
export type RunNetwork = (name: string, arrays: Arrays) => Promise<Record<string, Float32Array>>;
/** The conditioner of a bundle. */
export declare function openConditioner(bundle: Bundle, run: RunNetwork): Promise<Conditioner>;
/** Refuse what has no meaning for a kind. */
export declare function take<Name extends keyof Asked>(asked: Asked, name: Name, takes: string): NonNullable<Asked[Name]>;
