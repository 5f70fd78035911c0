/** A bundle: `bundle.json`, and files that are handed out only after their checksum matched. */
import { BundleError } from "./errors.js";
import { openFolder, sha256 } from "./files.js";
const MANIFEST = "bundle.json";
const FORMAT = 5;
const MANIFEST_LIMIT = 1 << 20;
/** The last lines of a manifest: its own checksum, which is that of everything else. */
const OWN_CHECKSUM = /,\n  "sha256": "([0-9a-f]{64})"\n\}\n$/;
/** Name of the network that makes images of latents. */
export const DECODER = "decoder";
/** Height and width of the images; of a bundle that makes several sizes the usual one. */
export function imageSize({ networks, latent, axes }) {
    const made = networks[DECODER]?.outputs[0].shape ?? latent.shape;
    const sides = [
        ["height", "image_height"],
        ["width", "image_width"],
    ];
    return sides.map(([side, imageSide], i) => {
        const length = made[made.length - 2 + i];
        if (typeof length === "number")
            return length;
        return (latent.shape[1 + i] * axes[imageSide].multiple_of) / axes[side].multiple_of;
    });
}
export class Bundle {
    manifest;
    sha256;
    readFile;
    constructor(manifest, 
    /** SHA-256 of `bundle.json`. */
    sha256, readFile) {
        this.manifest = manifest;
        this.sha256 = sha256;
        this.readFile = readFile;
    }
    /** Read and check the manifest of a bundle; its files are checked when they are read. */
    static async open(address, options = {}) {
        const readFile = openFolder(address);
        const data = await readFile(MANIFEST);
        if (data.length > MANIFEST_LIMIT)
            throw new BundleError(`${MANIFEST} is larger than ${MANIFEST_LIMIT} bytes`);
        const digest = await sha256(data);
        if (options.sha256 !== undefined && digest !== options.sha256) {
            throw new BundleError(`${MANIFEST} has SHA-256 ${digest}, not the ${options.sha256} that was asked for`);
        }
        return new Bundle(await parseManifest(data), digest, readFile);
    }
    /** The content of one file, after its size and hash matched the manifest. */
    async read(name) {
        const expected = this.manifest.files[name];
        if (!Object.hasOwn(this.manifest.files, name))
            throw new BundleError(`the bundle does not list ${name}`);
        const data = await this.readFile(name);
        if (data.length !== expected.size || (await sha256(data)) !== expected.sha256) {
            throw new BundleError(`${name} does not match its checksum in ${MANIFEST}; copy the bundle again`);
        }
        return data;
    }
    /** A network's file, and the files that it keeps weights in, by their names. */
    async readNetwork(name, precision) {
        const network = this.manifest.networks[name];
        const files = network?.files[precision];
        if (!files?.length)
            throw new BundleError(`the bundle has no ${name} in ${precision}`);
        const [model, ...weights] = await Promise.all(files.map((file) => this.read(file)));
        return [model, Object.fromEntries(weights.map((data, i) => [files[i + 1], data]))];
    }
    /** The content of an asset, such as a tokenizer. */
    async readAsset(name) {
        const file = this.manifest.assets[name];
        if (file === undefined)
            throw new BundleError(`the bundle has no asset ${name}; export it again`);
        return this.read(file);
    }
}
async function parseManifest(data) {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(data);
    let manifest;
    try {
        manifest = JSON.parse(text);
    }
    catch (error) {
        throw new BundleError(`${MANIFEST} is not JSON: ${error.message}`);
    }
    if (manifest?.format_version !== FORMAT) {
        throw new BundleError(`${MANIFEST} has format version ${manifest?.format_version}, this release reads ${FORMAT}; export it again`);
    }
    const own = OWN_CHECKSUM.exec(text);
    const rest = new TextEncoder().encode(text.replace(OWN_CHECKSUM, "\n}\n"));
    if (own === null || (await sha256(rest)) !== own[1]) {
        throw new BundleError(`${MANIFEST} does not match its own checksum; copy the bundle again`);
    }
    for (const name of Object.keys(manifest.files)) {
        if (name === "." || name === ".." || /[/\\]/.test(name)) {
            throw new BundleError(`${MANIFEST} lists a file outside its folder: ${name}`);
        }
    }
    return manifest;
}
