"""Makes the small cases of this folder: scout-nano's vocabulary and four learned here, and the references' ids.

    python make.py NANO_FOLDER    # PyPI: tokenizers 0.23.3, sentencepiece 0.2.3; NANO_FOLDER holds scout-nano's tokenizer.json
"""
import json
import random
import sys
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "peers" / "tokenizers"))
from texts import CODE, FIXED, SENTENCES, texts  # noqa: E402

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PIPELINES = {
    "gpt2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}


def learn(name, steps):
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator((text for text, _ in texts(1, 60_000)), trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|eot|>", "<|im_end|>"])
    # Two tokens that merging cannot reach: found whole by Llama 3's rule.
    tree = json.loads(tokenizer.to_str())
    if name == "llama3":
        tree["model"]["vocab"] |= {"Ġviá»ĩc": 483, "Ġjeho": 484}
    return tree


def save(name, tree, encode, seed):
    if tree is not None:
        (HERE / f"{name}.json").write_text(json.dumps(tree, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    r = random.Random(seed)
    chosen = FIXED[:12] + [" " * 60, "a" * 99 + "\n" * 60, " việc jeho"] + [text for text, _ in r.sample(list(texts(seed, 60_000)), 12)]
    with open(HERE / f"{name}.jsonl", "w", encoding="utf-8") as out:
        for text in (text[:300] for text in chosen):
            for parse in [False, True]:
                ids = encode(text, parse)
                if ids is not None:
                    out.write(json.dumps({"text": text, "parse": parse, "ids": ids}, separators=(",", ":")) + "\n")


def byte_pairs(name, tree, seed):
    with_specials = Tokenizer.from_str(json.dumps(tree))
    without = Tokenizer.from_str(json.dumps(tree | {"added_tokens": []}))
    save(name, tree, lambda text, parse: (with_specials if parse else without).encode(text, add_special_tokens=False).ids, seed)


def main():
    byte_pairs("scout-nano", json.loads((Path(sys.argv[1]) / "tokenizer.json").read_text(encoding="utf-8")), 10)
    for seed, (name, steps) in enumerate(PIPELINES.items(), 11):
        byte_pairs(name, learn(name, steps), seed)
    lines = [text.replace("\n", " ") for text in SENTENCES[:5] + CODE] * 20
    prefix = HERE / "sentencepiece"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), model_type="bpe", vocab_size=640, byte_fallback=True, num_threads=1,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, max_sentence_length=100_000, minloglevel=2)
    prefix.with_suffix(".vocab").unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(prefix.with_suffix(".model")))
    save("sentencepiece", None, lambda text, parse: None if parse else model.encode(text), 20)


if __name__ == "__main__":
    main()
