/** Files of a bundle, from a web server or, in Node.js, from a folder. */
import { BundleError } from "./errors.js";
/** What reads the files under an address: a URL, a path of this page's site, or in Node.js a folder. */
export function openFolder(address) {
    const text = String(address).replace(/\/*$/, "/");
    const isInBrowser = typeof document !== "undefined" || typeof WorkerGlobalScope !== "undefined";
    if (/^https?:/.test(text) || isInBrowser)
        return (name) => fetchFile(text + encodeURIComponent(name));
    return (name) => readFromDisk(text, name);
}
async function fetchFile(url) {
    let answer;
    try {
        answer = await fetch(url);
    }
    catch (error) {
        throw new BundleError(`${url} cannot be fetched: ${error.message}`);
    }
    if (!answer.ok)
        throw new BundleError(`${url} cannot be fetched: the server answered ${answer.status}`);
    return new Uint8Array(await answer.arrayBuffer());
}
async function readFromDisk(folder, name) {
    const fs = await import(/* webpackIgnore: true */ "node:fs/promises");
    try {
        return new Uint8Array(await fs.readFile(folder.startsWith("file:") ? new URL(name, folder) : folder + name));
    }
    catch (error) {
        throw new BundleError(`${folder}${name} cannot be read: ${error.message}`);
    }
}
/** SHA-256 of bytes, in hexadecimal. */
export async function sha256(data) {
    if (!globalThis.crypto?.subtle) {
        throw new BundleError("checksums need a page that comes over https, or from localhost");
    }
    const digest = await crypto.subtle.digest("SHA-256", data);
    return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
