/** What steers an image: classes, prompts or nothing. One registry, as in `piflow_edge/conditioning`. */
import { BundleError, RequestError } from "./errors.js";
import { openPrompts } from "./text/prompts.js";
const KINDS = {
    class: async (described) => openClasses(described.names, described.input),
    text: openPrompts,
    none: async () => NOTHING,
};
/** The conditioner of a bundle. */
export function openConditioner(bundle, run) {
    const described = bundle.manifest.conditioning;
    if (!Object.hasOwn(KINDS, described?.kind)) {
        throw new BundleError(`this release reads ${Object.keys(KINDS).join(", ")}; the bundle takes ${described?.kind}`);
    }
    return KINDS[described.kind](described, bundle, run);
}
/** Refuse what has no meaning for a kind. */
export function take(asked, name, takes) {
    for (const [other, value] of Object.entries(asked)) {
        if (value !== undefined && other !== name)
            throw new RequestError(`${other} have no meaning here; ${takes}`);
    }
    const value = asked[name];
    if (value === undefined)
        throw new RequestError(`give ${name}; ${takes}`);
    return value;
}
function openClasses(names, input) {
    const takes = `there are ${names.length} classes: ${names.slice(0, 20).join(", ")}${names.length > 20 ? ", ..." : ""}`;
    function findId(label) {
        const named = names.indexOf(label);
        const id = named >= 0 ? named : typeof label === "string" && /^\d{1,9}$/.test(label) ? Number(label) : label;
        if (typeof id !== "number" || !Number.isInteger(id) || id < 0 || id >= names.length) {
            throw new RequestError(`got label ${JSON.stringify(label)}; ${takes}`);
        }
        return id;
    }
    return {
        positional: "labels",
        async encode(asked) {
            const ids = [take(asked, "labels", takes)].flat().map(findId);
            if (!ids.length)
                throw new RequestError(`give one label or more; ${takes}`);
            const data = BigInt64Array.from(ids, BigInt);
            return { arrays: { [input]: { data, shape: [ids.length] } }, descriptions: ids.map((label) => ({ label })) };
        },
    };
}
const NOTHING = {
    positional: "count",
    async encode(asked) {
        const count = take(asked, "count", "nothing steers these images");
        if (!Number.isInteger(count) || count < 1)
            throw new RequestError(`count is 1 or more; got ${count}`);
        return { arrays: {}, descriptions: Array.from({ length: count }, () => ({})) };
    },
};
