/** How an image was made, as `piflow_edge/runtime/recipe.py` reads it. */
const VERSION = 2;
/** The recipe of images that started from a seed. */
export function buildRecipe(made) {
    return { version: VERSION, ...made, noise: null, image: null, mask: null };
}
/** One line of JSON in ASCII. Whole numbers above 2^53 keep their digits. */
export function writeRecipe(recipe) {
    const { seeds, ...rest } = recipe;
    const pairs = `[${seeds.map((pair) => `[${pair.join(",")}]`).join(",")}]`;
    const text = `{"seeds":${pairs},${JSON.stringify(rest).slice(1)}`;
    return text.replace(/[\u007f-\uffff]/g, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
}
