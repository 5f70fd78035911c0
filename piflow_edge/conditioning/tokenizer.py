"""A prompt as the ids that a text encoder was trained on.

The tokenizer itself is the model's own `tokenizer.json`, read by the `tokenizers` library; here is what a pipeline puts
around it: template, longest length, padding.
"""

from dataclasses import dataclass

import numpy as np

from piflow_edge.errors import ConditioningError, MissingExtraError

# Characters of a prompt that are tokenized. Thousands of times what an encoder reads; more is an accident or an attack.
LONGEST_PROMPT = 100_000


@dataclass(frozen=True)
class Tokens:
    """A prompt in ids. `ids`: int64 (T,). `mask`: int64 (T,), 1 for what was said and 0 for padding.

    `cut`: the end of the text that did not fit, "" if all did.
    """

    ids: np.ndarray
    mask: np.ndarray
    cut: str


class PromptTokenizer:
    """The `tokenizer.json` of one text encoder with its pipeline's settings. Threads may share it.

    Args:
        file: bytes of the `tokenizer.json`. Its own truncation and padding are not used.
        template: text around the prompt, which stands for "{}" in it.
        max_tokens: longest list of ids, special tokens included; the rest of a prompt is cut off.
        pad_to_max: fill up to `max_tokens` with `pad_id`; else ids are as long as the prompt.
        pad_id: id of the padding.
        pad_left: pad before the prompt, not after it.

    Raises:
        MissingExtraError: `tokenizers` is not installed.
        ConditioningError: the file is no tokenizer.
    """

    def __init__(
        self,
        file: bytes,
        *,
        template: str = "{}",
        max_tokens: int,
        pad_to_max: bool = False,
        pad_id: int = 0,
        pad_left: bool = False,
    ):
        self.template, self.max_tokens = template, max_tokens
        self.pad_to_max, self.pad_id, self.pad_left = pad_to_max, pad_id, pad_left
        self._tokenizer = _read_tokenizer(file)
        self._tokenizer.no_padding()
        try:
            self._tokenizer.enable_truncation(max_tokens)
        except Exception as error:  # the library has no class of its own
            raise ConditioningError(f"the tokenizer cannot cut at {max_tokens} tokens: {error}") from error

    def encode(self, prompt: str) -> Tokens:
        """Return a prompt's ids.

        Raises:
            ConditioningError: not a text, one that UTF-8 cannot hold, one that is far too long, or one without a token.
        """
        check_prompt(prompt)
        # Not str.format: a prompt may hold braces, and so may a template.
        text = self.template.replace("{}", prompt, 1)
        encoding = self._tokenizer.encode(text)
        ids = np.array(encoding.ids, np.int64)
        if not len(ids):
            raise ConditioningError(
                f"the prompt {prompt!r:.60} holds nothing the tokenizer knows; give a word"
            )
        padding = self.max_tokens - len(ids) if self.pad_to_max else 0
        sides = (padding, 0) if self.pad_left else (0, padding)
        return Tokens(
            np.pad(ids, sides, constant_values=self.pad_id),
            np.pad(np.ones_like(ids), sides),
            _cut_text(text, encoding),
        )


def check_prompt(prompt) -> None:
    """Raise ConditioningError for what is no prompt: no text, halves of characters, a whole book."""
    if not isinstance(prompt, str):
        raise ConditioningError(f"a prompt is a text; got {prompt!r:.60}")
    if len(prompt) > LONGEST_PROMPT:
        raise ConditioningError(f"a prompt has up to {LONGEST_PROMPT:,} characters; got {len(prompt):,}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ConditioningError(
            f"a prompt is text that UTF-8 can hold; got half a character, {prompt[error.start]!r}, at position "
            f"{error.start}"
        ) from error


def _read_tokenizer(file: bytes):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(
            "prompts need 'tokenizers'; get it with: pip install 'piflow-edge[text]'"
        ) from error
    try:
        return Tokenizer.from_buffer(bytes(file))
    except Exception as error:  # the library has no class of its own
        raise ConditioningError(f"the tokenizer.json cannot be read: {error}") from error


def _cut_text(text: str, encoding) -> str:
    """The part of `text` that the ids do not cover."""
    if not encoding.overflowing:
        return ""
    # Special tokens stand at (0, 0).
    return text[max((end for _, end in encoding.offsets), default=0) :].strip()
