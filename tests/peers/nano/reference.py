"""Which answers the scout-nano checkpoint gets right in NumPy: the reference that `evaluate.py` compares the daemon with.

    python reference.py CHECKPOINT FOLDER_OF_REF_LLAMA4 -n 40 > reference.json

CHECKPOINT is the Hugging Face folder of scout-nano, the other folder holds `ref_llama4.py`, the readable NumPy model.
Needs numpy and tokenizers. An answer counts if the arg max under the true prefix is right for each of its tokens, which
is the same as greedy decoding giving exactly that answer.
"""
import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[2] / "models/recipe"))
from corpus import conversation  # noqa: E402

SPLITS = ("seen", "tmpl", "ent", "both")
SEED = 987654


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("-n", type=int, default=40, help="conversations of each split")
    a = parser.parse_args()
    sys.path.insert(0, str(a.reference))
    import numpy as np
    import ref_llama4
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(a.checkpoint / "tokenizer.json"))
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    special = tokenizer.token_to_id
    config = json.loads((a.checkpoint / "config.json").read_text())
    tensors = ref_llama4.read_safetensors(a.checkpoint / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    read, ref_llama4.read_safetensors = ref_llama4.read_safetensors, lambda path: tensors
    config, weights = ref_llama4.load_hf(a.checkpoint)
    ref_llama4.read_safetensors = read

    def turn(role: str, text: str) -> list[int]:
        head = [special("<|header_start|>"), *encode(role), special("<|header_end|>"), *encode("\n\n")]
        return [*head, *encode(text), special("<|eot|>")]

    out = {}
    for split in SPLITS:
        rng = random.Random(f"{SEED}-{split}")
        hits = []
        for _ in range(a.n):
            system, turns = conversation(rng, split)
            ids, spans = [special("<|begin_of_text|>")], []

            def answer(text: str) -> None:
                body = turn("assistant", text)
                start = len(ids) + len(body) - len(encode(text)) - 1
                ids.extend(body)
                spans.append((start, len(ids)))

            if system:
                ids.extend(turn("system", system))
            for t in turns:
                ids.extend(turn("user", t.user))
                answer(t.answer)
                if t.result:
                    ids.extend(turn("ipython", t.result))
                    answer(t.reply)
            best = ref_llama4.forward(config, weights, np.array(ids)).argmax(-1)
            hits.append("".join("1" if (best[i - 1:j - 1] == ids[i:j]).all() else "0" for i, j in spans))
        out[split] = hits
    json.dump({"seed": SEED, "conversations": a.n, "hits": out}, sys.stdout, indent=0)


if __name__ == "__main__":
    main()
