"""python make.py FOLDER full|short: a made-up sharded Llama 4 checkpoint of Scout's form.

`full` has Scout's own sizes, cut to four layers (21.8 GB); `short` is narrower (1.9 GB). The weights are normal numbers on
the BF16 grid: a pool of eight million, taken from shifting places with shifting low bits, so that writing them costs little
more than the disk does. Prints the bytes of all shards.
"""

import json
import sys
from math import prod
from pathlib import Path

import numpy as np

SHAPES = {
    "full": dict(hidden=5120, heads=40, kv_heads=8, head=128, width=8192, dense=16384, experts=16, layers=4, vocab=202048,
                 shard=5 << 30),
    "short": dict(hidden=2048, heads=16, kv_heads=8, head=128, width=4096, dense=8192, experts=16, layers=2, vocab=32000,
                  shard=600 << 20),
}
POOL, CHUNK = 8 << 20, 32 << 20


def tensors(s):
    """Name and shape of every tensor, as `Llama4ForConditionalGeneration` holds them."""
    h, w, e = s["hidden"], s["width"], s["experts"]
    q, kv = s["heads"] * s["head"], s["kv_heads"] * s["head"]
    yield "model.embed_tokens.weight", [s["vocab"], h]
    for layer in range(s["layers"]):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", [h]
        yield f"{base}.post_attention_layernorm.weight", [h]
        for name, rows, cols in [("q", q, h), ("k", kv, h), ("v", kv, h), ("o", h, q)]:
            yield f"{base}.self_attn.{name}_proj.weight", [rows, cols]
        yield f"{base}.feed_forward.router.weight", [e, h]
        yield f"{base}.feed_forward.experts.gate_up_proj", [e, h, 2 * w]
        yield f"{base}.feed_forward.experts.down_proj", [e, w, h]
        for name, rows, cols in [("gate", w, h), ("up", w, h), ("down", h, w)]:
            yield f"{base}.feed_forward.shared_expert.{name}_proj.weight", [rows, cols]
    yield "model.norm.weight", [h]
    yield "lm_head.weight", [s["vocab"], h]


def shards(s):
    parts, size = [[]], 0
    for name, shape in tensors(s):
        if parts[-1] and size + 2 * prod(shape) > s["shard"]:
            parts.append([])
            size = 0
        parts[-1].append((f"language_model.{name}", shape))
        size += 2 * prod(shape)
    return parts


def main():
    folder, s = Path(sys.argv[1]), SHAPES[sys.argv[2]]
    folder.mkdir(parents=True)
    values = (np.random.default_rng(11).standard_normal(POOL, dtype=np.float32) * np.float32(0.02)).view(np.uint32)
    pool = np.tile((values >> 16).astype("<u2"), CHUNK // POOL + 1)
    parts, index, total, turn = shards(s), {}, 0, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        header, at = {}, 0
        for name, shape in part:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + 2 * prod(shape)]}
            at += 2 * prod(shape)
            index[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb", buffering=0) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, shape in part:
                left = prod(shape)
                while left:
                    count, start = min(left, CHUNK), turn * 65537 % POOL
                    out.write((pool[start:start + count] ^ np.uint16(turn % 64)).tobytes())
                    left, turn = left - count, turn + 1
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    text_config = dict(hidden_size=s["hidden"], vocab_size=s["vocab"], num_hidden_layers=s["layers"], head_dim=s["head"],
                       num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], intermediate_size=s["width"],
                       intermediate_size_mlp=s["dense"], num_local_experts=s["experts"], num_experts_per_tok=1,
                       interleave_moe_layer_step=1, use_qk_norm=True, max_position_embeddings=10485760, rms_norm_eps=1e-5,
                       rope_theta=500000.0, bos_token_id=1, eos_token_id=2)
    config = dict(architectures=["Llama4ForConditionalGeneration"], text_config=text_config)
    (folder / "config.json").write_text(json.dumps(config))
    letters = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = {"model": {"type": "BPE", "vocab": letters, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    print(total)


main()
