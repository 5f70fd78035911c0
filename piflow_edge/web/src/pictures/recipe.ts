/** How an image was made, as `piflow_edge/runtime/recipe.py` reads it. */

import type { Seed } from "../noise.js";
import type { Solver } from "../policies/solvers.js";

const VERSION = 2;

export interface Recipe {
  version: number;
  bundle: string;
  bundle_sha256: string;
  precision: string;
  engine: string;
  device: string;
  conditioning: object[];
  seeds: [Seed, Seed][];
  settings: {
    nfe: number;
    substeps: number;
    solver: Solver;
    temperature: number;
    h: number | "inf";
    strength: number;
    resamples: number;
    height: number | null;
    width: number | null;
  };
  noise: null;
  image: null;
  mask: null;
  release: string;
}

/** The recipe of images that started from a seed. */
export function buildRecipe(made: Omit<Recipe, "version" | "noise" | "image" | "mask">): Recipe {
  return { version: VERSION, ...made, noise: null, image: null, mask: null };
}

/** One line of JSON in ASCII. Whole numbers above 2^53 keep their digits. */
export function writeRecipe(recipe: Recipe): string {
  const { seeds, ...rest } = recipe;
  const pairs = `[${seeds.map((pair) => `[${pair.join(",")}]`).join(",")}]`;
  const text = `{"seeds":${pairs},${JSON.stringify(rest).slice(1)}`;
  return text.replace(/[\u007f-\uffff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
