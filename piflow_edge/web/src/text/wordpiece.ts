/**
 * WordPiece, as BERT and its children tokenize: the part of Hugging Face's `tokenizer.json` that these models use.
 *
 * Of all characters, some 670 of rare scripts are read otherwise than by the `tokenizers` library, whose tables are of
 * an older Unicode: Adlam, N'Ko and others that the vocabularies of such models do not hold either.
 */

import { BundleError } from "../errors.js";

interface AddedToken {
  id: number;
  content: string;
}

/** A tokenizer of kind WordPiece with BERT's normalizer and splitting. */
export class WordPiece {
  private readonly vocabulary: Map<string, number>;
  private readonly unknown: number;
  private readonly prefix: string;
  private readonly longestWord: number;
  private readonly added: AddedToken[];
  private readonly normalizer: any;
  private readonly before: number[];
  private readonly after: number[];

  /** `file`: bytes of a `tokenizer.json`. */
  constructor(file: Uint8Array) {
    const body = JSON.parse(new TextDecoder().decode(file));
    const kinds = [body.model?.type, body.normalizer?.type, body.pre_tokenizer?.type].join(", ");
    if (kinds !== "WordPiece, BertNormalizer, BertPreTokenizer") {
      throw new BundleError(`prompts are read by WordPiece tokenizers of BERT's kind here; the bundle has ${kinds}`);
    }
    this.vocabulary = new Map(Object.entries<number>(body.model.vocab));
    this.unknown = this.vocabulary.get(body.model.unk_token) as number;
    this.prefix = body.model.continuing_subword_prefix;
    this.longestWord = body.model.max_input_chars_per_word;
    this.normalizer = body.normalizer;
    this.added = (body.added_tokens as AddedToken[]).filter((token) => token.content !== "");
    [this.before, this.after] = readEnds(body.post_processor);
  }

  /** The ids of a text with those around it, at most `longest`. */
  encode(text: string, longest: number): number[] {
    const room = longest - this.before.length - this.after.length;
    const ids = this.splitAdded(text).flatMap((part) =>
      typeof part === "number" ? [part] : this.splitWords(this.normalize(part)).flatMap((word) => this.cutWord(word)),
    );
    return [...this.before, ...ids.slice(0, Math.max(room, 0)), ...this.after];
  }

  /** Special tokens that stand in the text itself, as their ids, and the text between them. */
  private splitAdded(text: string): (string | number)[] {
    const parts: (string | number)[] = [];
    let start = 0;
    for (let at = 0; at < text.length; ) {
      const token = this.findAdded(text, at);
      if (token === undefined) {
        at++;
        continue;
      }
      if (at > start) parts.push(text.slice(start, at));
      parts.push(token.id);
      start = at += token.content.length;
    }
    if (start < text.length) parts.push(text.slice(start));
    return parts;
  }

  private findAdded(text: string, at: number): AddedToken | undefined {
    let found: AddedToken | undefined;
    for (const token of this.added) {
      if (text.startsWith(token.content, at) && token.content.length > (found?.content.length ?? 0)) found = token;
    }
    return found;
  }

  private normalize(text: string): string {
    const { clean_text, handle_chinese_chars, strip_accents, lowercase } = this.normalizer;
    if (clean_text) text = cleanText(text);
    if (handle_chinese_chars) text = text.replace(CHINESE, " $& ");
    if (strip_accents ?? lowercase) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
    return lowercase ? lowerCase(text) : text;
  }

  /** At spaces, which are dropped, and around each punctuation mark, which is kept. */
  private splitWords(text: string): string[] {
    return text
      .split(SPACES)
      .flatMap((part) => part.split(PUNCTUATION))
      .filter((word) => word !== "");
  }

  /** The longest pieces from the left; a word with one that is not known is unknown as a whole. */
  private cutWord(word: string): number[] {
    const letters = Array.from(word);
    if (letters.length > this.longestWord) return [this.unknown];
    const ids: number[] = [];
    for (let start = 0; start < letters.length; ) {
      let end = letters.length;
      let id: number | undefined;
      for (; end > start; end--) {
        id = this.vocabulary.get((start ? this.prefix : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.unknown];
      ids.push(id);
      start = end;
    }
    return ids;
  }
}

const CHINESE =
  /[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]/gu;
const SPACES = /\p{White_Space}+/u;
const PUNCTUATION = /([!-/:-@[-`{-~\p{P}])/u;

/** Spaces of any kind become plain ones; control characters, formats and letters of nobody's are dropped. */
function cleanText(text: string): string {
  return text
    .replace(/[\0\ufffd]/g, "")
    .replace(/[\t\n\r]/g, " ")
    .replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/gu, "")
    .replace(/\p{White_Space}/gu, " ");
}

/** Character by character, as the `tokenizers` library does: a sigma at the end of a word stays a plain one. */
function lowerCase(text: string): string {
  return Array.from(text, (letter) => letter.toLowerCase()).join("");
}

/** The ids before and after a text. */
function readEnds(processor: any): [number[], number[]] {
  if (processor === null || processor === undefined) return [[], []];
  if (processor.type === "BertProcessing") return [[processor.cls[1]], [processor.sep[1]]];
  if (processor.type !== "TemplateProcessing") throw new BundleError(`the tokenizer ends texts by ${processor.type}`);
  const sides: [number[], number[]] = [[], []];
  let side = 0;
  for (const piece of processor.single) {
    if (piece.Sequence) side = 1;
    else sides[side].push(...processor.special_tokens[piece.SpecialToken.id].ids);
  }
  return sides;
}
