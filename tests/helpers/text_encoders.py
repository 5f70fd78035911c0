"""Small text encoders of the kinds that published models have, made on the spot: nothing is downloaded."""

from functools import cache

# What their vocabularies are learnt from: enough that words, pieces and single bytes all occur.
_CORPUS = [
    "a red apple on a wooden table", "a photo of a cat wearing a hat", "happy smiling face with big eyes",
    "pizza with a smile", "the quick brown fox jumps over the lazy dog", "an oil painting of mountains at dawn, 4k",
    "una manzana roja", "eine Katze, die lacht", "красное яблоко", "苹果", "تفاحة حمراء", "numbers 0123456789 !?.,:;",
]  # fmt: skip


@cache
def trained_vocabulary(kind: str):
    """A `tokenizers.Tokenizer` of this kind with a vocabulary learnt from the corpus."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        ends = {"end_of_word_suffix": "</w>"} if kind == "clip" else {}
        tokenizer = Tokenizer(models.BPE(**ends))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=special,
            **ends,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


@cache
def transformers_tokenizer(kind: str):
    """The same vocabulary as a tokenizer of `transformers`, with the class that real models of this kind have."""
    import json

    import transformers

    model = json.loads(trained_vocabulary(kind).to_str())["model"]
    vocabulary = model["vocab"]
    if kind == "wordpiece":
        return transformers.BertTokenizer(vocab=vocabulary)
    if kind == "unigram":
        return transformers.T5Tokenizer(vocab=[tuple(pair) for pair in vocabulary], extra_ids=0)
    merges = [tuple(merge) for merge in model["merges"]]
    if kind == "clip":
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    return transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)


def nasty_prompts(count: int) -> list[str]:
    """Prompts that break tokenizers, always the same: by hand first, then mixed at random."""
    import random

    letters = [
        "a red apple",
        "Ünïcödé",
        "e\u0301",
        "שלום",
        "مرحبا",
        "苹果",
        "ｆｕｌｌ",
        "ﬁ",
        "ſ",
        "İ",
        "ß",
        "𝒳",
        "한글",
        "ᄀ",
    ]
    emoji = ["👩\u200d🚀", "👍🏽", "🇩🇪", "\ue000", "\U000e0041", "\U0010ffff", "½", "０", "ก็", "क्षि"]
    controls = ["\u202eabc", "\u200b", "\ufeff", "\u00a0", "\t", "\n", "\r\n", "\x00", "\x07", "\x7f", "  "]
    special = [
        "[SEP]",
        "<|endoftext|>",
        "</s>",
        "<pad>",
        "<unk>",
        "▁",
        "Ġ",
        "</w>",
        "{}",
        "{0}",
        "%s",
        "&amp;",
        "<b>",
    ]
    marks = ["1234567890", "don't", "I'LL", "...", "—", "“q”", "\\", "/", "a" * 40, "'s"]
    pieces = [*letters, *emoji, *controls, *special, *marks]
    prompts = ["", " ", "\n", "word " * 300, "🍎" * 200, "é" * 500, *pieces]
    draw = random.Random(0)
    while len(prompts) < count:
        joiner = draw.choice(["", " ", ", "])
        prompts.append(joiner.join(draw.choices(pieces, k=draw.randint(2, 12))))
    return prompts[:count]


@cache
def tiny_text_encoder(kind: str):
    """A text encoder of this kind with random weights, as `load_text_encoder` returns it."""
    import torch
    import transformers

    from piflow_edge.distill.networks.text_encoders import FAMILIES, build_text_encoder

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "bert":
            words = transformers_tokenizer("wordpiece")
            model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **small))
        elif kind == "clip":
            words = transformers_tokenizer("clip")
            ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
            model = transformers.CLIPTextModel(
                transformers.CLIPTextConfig(vocab_size=len(words), **ends, **small)
            )
        elif kind == "t5":
            words = transformers_tokenizer("unigram")
            sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
            config = transformers.T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **sizes)
            model = transformers.T5EncoderModel(config)
        else:
            words = transformers_tokenizer("qwen")
            rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
            ends = {"bos_token_id": 0, "eos_token_id": 1}
            text = {"vocab_size": len(words), "num_key_value_heads": 1, "rope_scaling": rope, **ends, **small}
            vision = {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 32,
                "out_hidden_size": 32,
            }
            config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            model = transformers.Qwen2_5_VLModel(config)
    model.set_attn_implementation("eager")
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    own = {"template": chat, "drop_tokens": 3, "layers": (-2, -1)} if kind == "qwen2_5_vl" else {}
    return build_text_encoder(model, words, FAMILIES[kind], kind, max_tokens=40, **own)
