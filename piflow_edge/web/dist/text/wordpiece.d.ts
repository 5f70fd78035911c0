/**
 * WordPiece, as BERT and its children tokenize: the part of Hugging Face's `tokenizer.json` that these models use.
 *
 * Of all characters, some 670 of rare scripts are read otherwise than by the `tokenizers` library, whose tables are of
 * an older Unicode: Adlam, N'Ko and others that the vocabularies of such models do not hold either.
 */
/** A tokenizer of kind WordPiece with BERT's normalizer and splitting. */
export declare class WordPiece {
    private readonly vocabulary;
    private readonly unknown;
    private readonly prefix;
    private readonly longestWord;
    private readonly added;
    private readonly normalizer;
    private readonly before;
    private readonly after;
    /** `file`: bytes of a `tokenizer.json`. */
    constructor(file: Uint8Array);
    /** The ids of a text with those around it, at most `longest`. */
    encode(text: string, longest: number): number[];
    /** Special tokens that stand in the text itself, as their ids, and the text between them. */
    private splitAdded;
    private findAdded;
    private normalize;
    /** At spaces, which are dropped, and around each punctuation mark, which is kept. */
    private splitWords;
    /** The longest pieces from the left; a word with one that is not known is unknown as a whole. */
    private cutWord;
}
