/**
 * What an ONNX file reaches for, read before an engine opens it: files that it keeps weights in, and domains of
 * operators. An engine follows whatever a graph says; so a graph is opened only if each file came with it.
 */

import { EngineError } from "./errors.js";

const KNOWN_DOMAINS = ["", "ai.onnx", "com.microsoft"];
const DEEPEST = 8;
const EXTERNAL = 1;

/** Refuse a model that keeps weights in files which did not come with it, or uses operators of unknown domains. */
export function checkModel(model: Uint8Array, files: string[]): void {
  const walk = new Walk(files);
  try {
    forEachField(model, (field, value) => {
      if (field === 7) walk.graph(bytes(value), 0);
      if (field === 25) walk.nodes(bytes(value), 7, 0); // a function's nodes
    });
  } catch (error) {
    if (error instanceof RangeError) throw new EngineError("the network is not a whole ONNX model; export again");
    throw error;
  }
}

class Walk {
  constructor(private readonly files: string[]) {}

  graph(data: Uint8Array, depth: number): void {
    if (depth > DEEPEST) throw new EngineError(`the network's graphs are nested more than ${DEEPEST} deep`);
    forEachField(data, (field, value) => {
      if (field === 5) this.tensor(bytes(value));
      if (field === 15) this.sparseTensor(bytes(value));
    });
    this.nodes(data, 1, depth);
  }

  nodes(data: Uint8Array, number: number, depth: number): void {
    forEachField(data, (field, value) => {
      if (field !== number) return;
      forEachField(bytes(value), (inner, found) => {
        if (inner === 7) this.domain(text(found));
        if (inner === 5) this.attribute(bytes(found), depth);
      });
    });
  }

  private attribute(data: Uint8Array, depth: number): void {
    forEachField(data, (field, value) => {
      if (field === 5 || field === 10) this.tensor(bytes(value));
      if (field === 6 || field === 11) this.graph(bytes(value), depth + 1);
      if (field === 22 || field === 23) this.sparseTensor(bytes(value));
    });
  }

  private sparseTensor(data: Uint8Array): void {
    forEachField(data, (field, value) => {
      if (field === 1 || field === 2) this.tensor(bytes(value));
    });
  }

  private tensor(data: Uint8Array): void {
    const places: string[] = [];
    let isExternal = false;
    forEachField(data, (field, value) => {
      if (field === 14) isExternal ||= value === EXTERNAL;
      if (field === 13) places.push(...readPlace(bytes(value)));
    });
    for (const place of places) {
      if (!this.files.includes(place)) {
        throw new EngineError(`the network keeps weights in ${place}, which did not come with it; export again`);
      }
    }
    if (isExternal && !places.length) throw new EngineError("the network keeps weights in a file that it does not name");
  }

  private domain(name: string): void {
    if (!KNOWN_DOMAINS.includes(name)) {
      throw new EngineError(`the network uses an operator of the domain ${name}; operators are of the standard`);
    }
  }
}

/** The file that an entry of a tensor's `external_data` names, if it is that entry. */
function readPlace(data: Uint8Array): string[] {
  let key = "";
  let value = "";
  forEachField(data, (field, found) => {
    if (field === 1) key = text(found);
    if (field === 2) value = text(found);
  });
  return key === "location" ? [value] : [];
}

type Value = number | Uint8Array;

/** Calls back with every field of a protobuf message. Numbers above 2^53 lose digits, which nothing here needs. */
function forEachField(data: Uint8Array, visit: (field: number, value: Value) => void): void {
  let at = 0;
  function take(count: number): number {
    at += count;
    if (at > data.length) throw new RangeError();
    return at;
  }
  function readVarint(): number {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = data[take(1) - 1];
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    throw new RangeError();
  }
  while (at < data.length) {
    const tag = readVarint();
    const kind = tag % 8;
    const field = Math.floor(tag / 8);
    if (kind === 0) visit(field, readVarint());
    else if (kind === 1) take(8);
    else if (kind === 5) take(4);
    else if (kind === 2) {
      const length = readVarint();
      visit(field, data.subarray(take(length) - length, at));
    } else throw new RangeError();
  }
}

function bytes(value: Value): Uint8Array {
  if (typeof value === "number") throw new RangeError();
  return value;
}

function text(value: Value): string {
  return new TextDecoder().decode(bytes(value));
}
