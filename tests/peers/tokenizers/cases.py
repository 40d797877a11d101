"""Writes cases for `tests/it/tokenizers.rs` into a folder: a tokenizer file and what the reference makes of the texts.

    python cases.py FOLDER [--bytes N]

NAME.json or NAME.model is the tokenizer, NAME.jsonl has a line per text: {"text" or "base64", "parse", "ids"}.
"""
import argparse
import base64
import json
import shutil
from pathlib import Path

import llama_models
import sentencepiece
import tiktoken
from llama_models.llama3.tokenizer import Tokenizer as Llama3
from llama_models.llama4.tokenizer import Tokenizer as Llama4

from texts import FIXED, texts


def write(folder, name, seed, bytes_wanted, encode, can_parse, more=()):
    count = size = 0
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
        for text, raw in [(text, None) for text in [*FIXED, *more]] + list(texts(seed, bytes_wanted)):
            for parse in [False, True] if can_parse else [False]:
                case = {"parse": parse, "ids": encode(text, parse)}
                case.update({"text": text} if raw is None else {"base64": base64.b64encode(raw).decode()})
                out.write(json.dumps(case, separators=(",", ":")) + "\n")
            count, size = count + 1, size + len(text.encode())
    print(f"{name}: {count} texts, {size} bytes")


def tiktoken_cases(folder, name, tokenizer, seed, bytes_wanted):
    """Meta's class cuts a text into slices before tiktoken sees it, to spare its stack; these texts are short enough without."""
    model = tokenizer.model
    assert isinstance(model, tiktoken.Encoding)

    def encode(text, parse):
        if parse:
            return model.encode(text, allowed_special="all")
        return model.encode(text, allowed_special=set(), disallowed_special=())

    # Tokens as texts of their own: Llama 3 has 588 that merging alone does not reach.
    single = [model.decode_single_token_bytes(token) for token in range(0, model.max_token_value - 3000, 29)]
    single = [token.decode() for token in single if token.decode("utf-8", "ignore").encode() == token]
    write(folder, name, seed, bytes_wanted, encode, True, [*single, " việc", " jeho"])


def sentencepiece_cases(folder, bytes_wanted):
    """No Llama 2 vocabulary may be fetched without an account: one of its kind is learned from the same texts."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text, _ in texts(5, 300_000)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sentencepiece"), model_type="bpe", vocab_size=3000, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, max_sentence_length=100_000, num_threads=1, minloglevel=2)
    corpus.unlink()
    (folder / "sentencepiece.vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    write(folder, "sentencepiece", 6, bytes_wanted, lambda text, _: model.encode(text), False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bytes", type=int, default=1_100_000, help="size of the text for each tokenizer")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    package = Path(llama_models.__file__).parent
    for name, tokenizer, seed in [("llama3", Llama3, 3), ("llama4", Llama4, 4)]:
        model = package / name / "tokenizer.model"
        shutil.copy(model, arguments.folder / f"{name}.model")
        tiktoken_cases(arguments.folder, name, tokenizer(model), seed, arguments.bytes)
    sentencepiece_cases(arguments.folder, arguments.bytes)


if __name__ == "__main__":
    main()
