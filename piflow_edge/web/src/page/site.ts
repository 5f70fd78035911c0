/** What the page is served with, as `site.json` says it. */

export interface Site {
  /** Of all that the page consists of; another version is another cache. */
  version: string;
  /** Bundles by name, with the address of their folder. */
  bundles: { name: string; path: string }[];
  /** Whether `piflow-edge serve` answers under the same address. */
  has_server: boolean;
  /** Folder with ONNX Runtime's files, where this browser can draw; null where they are not here. */
  ort: string | null;
  /** Files to keep for use offline. */
  files: string[];
}

/** What one picture is asked for with. */
export interface Wish {
  subject: string | number;
  seed: number;
  nfe: number;
}

/** Pixels for a canvas. */
export interface Picture {
  width: number;
  height: number;
  rgba: Uint8ClampedArray<ArrayBuffer>;
}

export interface Report {
  call: number;
  nfe: number;
  preview: Picture | null;
}

export interface Drawn {
  picture: Picture;
  /** The file to download. */
  file: Blob;
  timings: Record<string, number>;
}

/** Something that draws: this browser or a server. */
export interface Drawer {
  draw(wish: Wish, report: (report: Report) => void, signal: AbortSignal): Promise<Drawn>;
  close(): void;
}

/** What the worker is sent. */
export type Order =
  | { kind: "open"; bundle: string; ort: string; provider: string }
  | { kind: "draw"; wish: Wish }
  | { kind: "stop" };

/** What the worker sends. */
export type Answer =
  | { kind: "opened"; ms: number }
  | { kind: "report"; report: Report }
  | { kind: "drawn"; drawn: Drawn }
  | { kind: "failed"; message: string; isCancelled: boolean };
