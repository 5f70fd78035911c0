/** Prompts: texts that the bundle's own encoders turn into what the network takes. As `piflow_edge/conditioning/text.py`. */
import { take } from "../conditioning.js";
import { RequestError } from "../errors.js";
import { WordPiece } from "./wordpiece.js";
/** Encodings of prompts that are kept. */
const KEPT_PROMPTS = 32;
const LONGEST_PROMPT = 100_000;
/** The conditioner of a bundle that reads prompts. */
export async function openPrompts(described, bundle, run) {
    const encoders = await Promise.all(described.encoders.map(async (spec) => {
        const tokenizer = new WordPiece(await bundle.readAsset(`tokenizer.${spec.name}.json`));
        return { spec, tokenizer };
    }));
    const inputs = described.inputs;
    const kept = new Map();
    async function encodePrompt(prompt) {
        const known = kept.get(prompt);
        if (known)
            return known;
        const fed = {};
        for (const { spec, tokenizer } of encoders)
            Object.assign(fed, await runEncoder(spec, tokenizer, prompt, inputs, run));
        kept.set(prompt, fed);
        for (const oldest of kept.keys())
            if (kept.size > KEPT_PROMPTS)
                kept.delete(oldest);
        return fed;
    }
    return {
        positional: "prompts",
        async encode(asked) {
            const prompts = [take(asked, "prompts", "the bundle reads prompts")].flat();
            if (!prompts.length)
                throw new RequestError("give one prompt or more; got none");
            prompts.forEach(checkPrompt);
            const parts = [];
            for (const prompt of prompts)
                parts.push(await encodePrompt(prompt));
            return { arrays: joinEncodings(parts, inputs), descriptions: prompts.map((prompt) => ({ prompt })) };
        },
    };
}
/** Ids of a prompt, and 1 for what was said and 0 for padding. */
function tokenize(spec, tokenizer, prompt) {
    const ids = tokenizer.encode(spec.template.replace("{}", () => prompt), spec.max_tokens);
    const mask = ids.map(() => 1);
    const padding = spec.pad_to_max ? spec.max_tokens - ids.length : 0;
    const filler = Array(padding).fill(spec.pad_id);
    const zeros = Array(padding).fill(0);
    return spec.pad_left
        ? { ids: [...filler, ...ids], mask: [...zeros, ...mask] }
        : { ids: [...ids, ...filler], mask: [...mask, ...zeros] };
}
/** What an encoder feeds the network for one prompt. */
async function runEncoder(spec, tokenizer, prompt, inputs, run) {
    const { ids, mask } = tokenize(spec, tokenizer, prompt);
    const attended = mask.map((said) => (spec.sees_padding ? 1n : BigInt(said)));
    const found = await run(`encoder.${spec.name}`, {
        input_ids: { data: BigInt64Array.from(ids, BigInt), shape: [1, ids.length] },
        attention_mask: { data: BigInt64Array.from(attended), shape: [1, ids.length] },
    });
    const said = mask.slice(spec.drop_tokens);
    const length = spec.fixed_length ? spec.max_tokens - spec.drop_tokens : said.length;
    const fed = {};
    if (spec.hidden_input !== null) {
        const width = found.hidden_states.length / ids.length;
        const data = new Float32Array(length * width);
        said.forEach((isSaid, t) => {
            if (!isSaid && spec.mask_input !== null)
                return; // padding is 0 where the network is told of it
            const from = (t + spec.drop_tokens) * width;
            data.set(found.hidden_states.subarray(from, from + width), t * width);
        });
        fed[spec.hidden_input] = { data, shape: [1, length, width] };
    }
    if (spec.mask_input !== null) {
        const padded = Array.from({ length }, (_, t) => said[t] ?? 0);
        const isFloat = inputs.find((input) => input.name === spec.mask_input)?.dtype === "float32";
        const data = isFloat ? Float32Array.from(padded) : BigInt64Array.from(padded, BigInt);
        fed[spec.mask_input] = { data, shape: [1, length] };
    }
    if (spec.pooled_input !== null) {
        fed[spec.pooled_input] = { data: found.pooled, shape: [1, found.pooled.length] };
    }
    return fed;
}
/** Encodings of several prompts as one batch; shorter ones are filled up with 0 along the tokens. */
function joinEncodings(parts, inputs) {
    const joined = {};
    for (const { name } of inputs) {
        const arrays = parts.map((part) => part[name]);
        const rest = arrays[0].shape.slice(1).map((_, axis) => Math.max(...arrays.map((array) => array.shape[axis + 1])));
        const size = rest.reduce((product, length) => product * length, 1);
        const Kind = arrays[0].data.constructor;
        const data = new Kind(parts.length * size);
        // Only the tokens, the first axis after the batch, differ in length: what is there stands in one piece.
        arrays.forEach((array, i) => data.set(array.data, i * size));
        joined[name] = { data, shape: [parts.length, ...rest] };
    }
    return joined;
}
function checkPrompt(prompt) {
    if (typeof prompt !== "string")
        throw new RequestError(`a prompt is a text; got ${JSON.stringify(prompt)}`);
    if (prompt.length > LONGEST_PROMPT)
        throw new RequestError(`a prompt has up to ${LONGEST_PROMPT} characters`);
    if (/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/.test(prompt)) {
        throw new RequestError("a prompt is text that UTF-8 can hold; got half a character");
    }
}
