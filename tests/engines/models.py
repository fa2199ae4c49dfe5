#!/usr/bin/env python3
"""Makes two language models that talk nonsense, so that a real engine can run without a download.

A server's scheduling, cache and streaming do not depend on what the weights say. Both models are of the llama
architecture with random weights from a fixed seed and share one byte-level BPE tokenizer of 4,096 entries, trained
here on made-up text: `tiny` is as fast as two cores allow, `slow` is slow enough to be caught in the middle of an
answer.

usage: models.py DIR      writes DIR/tiny/ (the tokenizer, as aiperf reads it), DIR/tiny.gguf and DIR/slow.gguf
"""

import json
import pathlib
import random
import sys

import gguf
import numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY = 4096
CONTEXT = 4096
HEAD = 32
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "request token batch queue server balance weight cache prefix prompt model stream chunk retry health check latency "
    "deadline connection header body tenant session turn answer question system user assistant please explain describe "
    "write summarize translate compute list example number table code function return value error open close"
).split()


def sentences(rng):
    """Lines of text with enough different words to fill the vocabulary."""
    starts, vowels = "b c d f g h k l m n p r s t v z br st tr pl".split(), "a e i o u ai ou".split()
    syllables = [start + vowel for start in starts for vowel in vowels]
    words = WORDS + ["".join(rng.choice(syllables) for _ in range(rng.randint(2, 3))) for _ in range(6000)]
    for _ in range(8000):
        yield " ".join(rng.choice(words) for _ in range(12)) + rng.choice([".", "?", "!", ",\n", ': 123 {"k": [7]}'])


def make_tokenizer(folder):
    """Trains the tokenizer and writes it as a Hugging Face folder; returns it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(random.Random(7)), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT)
    settings = {
        "backend": "tokenizers",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    return json.loads((folder / "tokenizer.json").read_text())


def make_model(path, tokenizer, hidden, layers):
    """Writes a model of the given size with random weights."""
    special = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    ids = tokenizer["model"]["vocab"] | special
    count = max(ids.values()) + 1
    tokens = [f"<unused{i}>" for i in range(count)]
    kinds = [gguf.TokenType.UNUSED] * count
    for text, number in ids.items():
        tokens[number] = text
        kinds[number] = gguf.TokenType.CONTROL if text in special else gguf.TokenType.NORMAL

    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name(path.stem)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(hidden)
    w.add_block_count(layers)
    w.add_feed_forward_length(hidden * 2)
    w.add_head_count(hidden // HEAD)
    w.add_head_count_kv(hidden // HEAD)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(HEAD)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(count)
    w.add_file_type(gguf.LlamaFileType.ALL_F32)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types(kinds)
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    w.add_eos_token_id(special["<|im_end|>"])
    w.add_bos_token_id(special["<|endoftext|>"])
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT)

    rng = numpy.random.default_rng(7)

    def noise(name, *shape, scale=0.05):
        w.add_tensor(name, (rng.standard_normal(shape) * scale).astype(numpy.float32))

    def ones(name):
        w.add_tensor(name, numpy.ones(hidden, numpy.float32))

    noise("token_embd.weight", count, hidden, scale=1.0)
    noise("output.weight", count, hidden, scale=0.3)
    ones("output_norm.weight")
    for i in range(layers):
        ones(f"blk.{i}.attn_norm.weight")
        ones(f"blk.{i}.ffn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            noise(f"blk.{i}.{part}.weight", hidden, hidden)
        noise(f"blk.{i}.ffn_gate.weight", hidden * 2, hidden)
        noise(f"blk.{i}.ffn_up.weight", hidden * 2, hidden)
        noise(f"blk.{i}.ffn_down.weight", hidden, hidden * 2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    out = pathlib.Path(sys.argv[1])
    tokenizer = make_tokenizer(out / "tiny")
    make_model(out / "tiny.gguf", tokenizer, hidden=64, layers=2)
    make_model(out / "slow.gguf", tokenizer, hidden=512, layers=8)


if __name__ == "__main__":
    main()
