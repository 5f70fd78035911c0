/** Files of a bundle, from a web server or, in Node.js, from a folder. */

import { BundleError } from "./errors.js";

/** Reads a file of a bundle by its name. */
export type ReadFile = (name: string) => Promise<Uint8Array>;

/** What reads the files under an address: a URL, a path of this page's site, or in Node.js a folder. */
export function openFolder(address: string | URL): ReadFile {
  const text = String(address).replace(/\/*$/, "/");
  const isInBrowser = typeof document !== "undefined" || typeof WorkerGlobalScope !== "undefined";
  if (/^https?:/.test(text) || isInBrowser) return (name) => fetchFile(text + encodeURIComponent(name));
  return (name) => readFromDisk(text, name);
}

declare const WorkerGlobalScope: unknown;

async function fetchFile(url: string): Promise<Uint8Array> {
  let answer: Response;
  try {
    answer = await fetch(url);
  } catch (error) {
    throw new BundleError(`${url} cannot be fetched: ${(error as Error).message}`);
  }
  if (!answer.ok) throw new BundleError(`${url} cannot be fetched: the server answered ${answer.status}`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function readFromDisk(folder: string, name: string): Promise<Uint8Array> {
  const fs = await import(/* webpackIgnore: true */ "node:fs/promises");
  try {
    return new Uint8Array(await fs.readFile(folder.startsWith("file:") ? new URL(name, folder) : folder + name));
  } catch (error) {
    throw new BundleError(`${folder}${name} cannot be read: ${(error as Error).message}`);
  }
}

/** SHA-256 of bytes, in hexadecimal. */
export async function sha256(data: Uint8Array): Promise<string> {
  if (!globalThis.crypto?.subtle) {
    throw new BundleError("checksums need a page that comes over https, or from localhost");
  }
  const digest = await crypto.subtle.digest("SHA-256", data as BufferSource);
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
