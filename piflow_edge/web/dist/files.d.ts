/** Files of a bundle, from a web server or, in Node.js, from a folder. */
/** Reads a file of a bundle by its name. */
export type ReadFile = (name: string) => Promise<Uint8Array>;
/** What reads the files under an address: a URL, a path of this page's site, or in Node.js a folder. */
export declare function openFolder(address: string | URL): ReadFile;
/** SHA-256 of bytes, in hexadecimal. */
export declare function sha256(data: Uint8Array): Promise<string>;
