/**
 * Keeps the page's files for use offline, and gives every answer the headers by which a page is isolated from others:
 * without them a browser lets WebAssembly have no threads.
 */
declare const worker: {
    addEventListener(name: string, listen: (event: any) => void): void;
    skipWaiting(): Promise<void>;
    clients: {
        claim(): Promise<void>;
    };
    registration: {
        scope: string;
    };
};
declare const VERSION: string | null;
declare const CACHE: string;
/** What is not kept: it is the server's work, or says what is new. */
declare const LIVE: RegExp;
declare function keepFiles(): Promise<void>;
declare function forgetOthers(): Promise<void>;
/** From the cache, else from the network, and then kept. */
declare function takeKept(request: Request): Promise<Response>;
/** From the network, or offline what was kept last. */
declare function askFirst(request: Request): Promise<Response>;
declare function isolate(answer: Response): Response;
