#!/usr/bin/env python3
"""Writes a GGUF in the shape of Llama 4 Scout (16 experts of which one is used, and a shared one, in every layer) with
random weights, for speed only: make.py OUT HIDDEN LAYERS WIDTH VOCABULARY"""
import array
import os
import random
import struct
import sys

F32, Q4_0 = 0, 2
EXPERTS, HEAD, KV_HEADS = 16, 128, 4
ALIGN = 16384  # as `scoutd convert` writes


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, kind, value):
    head = text(name) + struct.pack("<I", kind)
    if kind == 4:
        return head + struct.pack("<I", value)
    if kind == 6:
        return head + struct.pack("<f", value)
    if kind == 7:
        return head + struct.pack("<B", value)
    if kind == 8:
        return head + text(value)
    inner, values = value
    pack = text if inner == 8 else lambda v: struct.pack("<i", v)
    return head + struct.pack("<IQ", inner, len(values)) + b"".join(map(pack, values))


def vocabulary(count):
    """Bytes in GPT-2's letters, made-up words that never merge, and two control tokens."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in keep]
    letters = [chr(b) for b in keep] + [chr(256 + n) for n in range(len(others))]
    words = [f"word{n}" for n in range(count - len(letters) - 2)]
    kinds = [1] * (count - 2) + [3, 3]
    return letters + words + ["<|begin_of_text|>", "<|eot|>"], kinds


def blocks(pool_blocks, sigma):
    """Q4_0 blocks: codes of mean 0 (a 0 becomes 8, which is none), one scale. The codes' deviation is about 4.3."""
    table = bytes((b | 8 if b & 15 == 0 else b) | (0x80 if b >> 4 == 0 else 0) for b in range(256))
    codes = os.urandom(16 * pool_blocks).translate(table)
    scale = struct.pack("<e", sigma / 4.3)
    return b"".join(scale + codes[16 * n:16 * n + 16] for n in range(pool_blocks))


def main():
    out, hidden, layers, width, vocab = sys.argv[1], *map(int, sys.argv[2:6])
    heads = hidden // HEAD
    tokens, kinds = vocabulary(vocab)
    p = "llama4."
    keys = [
        key("general.architecture", 8, "llama4"), key("general.name", 8, "scout-shaped"),
        key("general.alignment", 4, ALIGN), key("general.file_type", 4, 2),
        key(p + "block_count", 4, layers), key(p + "context_length", 4, 32768),
        key(p + "embedding_length", 4, hidden), key(p + "feed_forward_length", 4, 2 * width),
        key(p + "expert_feed_forward_length", 4, width), key(p + "expert_count", 4, EXPERTS),
        key(p + "expert_used_count", 4, 1), key(p + "interleave_moe_layer_step", 4, 1),
        key(p + "attention.head_count", 4, heads), key(p + "attention.head_count_kv", 4, KV_HEADS),
        key(p + "attention.key_length", 4, HEAD), key(p + "attention.value_length", 4, HEAD),
        key(p + "attention.layer_norm_rms_epsilon", 6, 1e-5), key(p + "rope.freq_base", 6, 500000.0),
        key(p + "rope.dimension_count", 4, HEAD), key(p + "vocab_size", 4, vocab),
        key("tokenizer.ggml.model", 8, "gpt2"), key("tokenizer.ggml.pre", 8, "llama4"),
        key("tokenizer.ggml.tokens", 9, (8, tokens)), key("tokenizer.ggml.token_type", 9, (5, kinds)),
        key("tokenizer.ggml.merges", 9, (8, [])), key("tokenizer.ggml.bos_token_id", 4, vocab - 2),
        key("tokenizer.ggml.eos_token_id", 4, vocab - 1), key("tokenizer.ggml.add_bos_token", 7, 1),
    ]
    depth = (2 * layers) ** 0.5
    tensors = [("token_embd", (hidden, vocab), Q4_0, 1.0), ("output", (hidden, vocab), Q4_0, 0.02),
               ("output_norm", (hidden,), F32, None)]
    for n in range(layers):
        b = f"blk.{n}."
        tensors += [(b + "attn_norm", (hidden,), F32, None), (b + "ffn_norm", (hidden,), F32, None),
                    (b + "attn_q", (hidden, heads * HEAD), Q4_0, 0.02),
                    (b + "attn_k", (hidden, KV_HEADS * HEAD), Q4_0, 0.02),
                    (b + "attn_v", (hidden, KV_HEADS * HEAD), Q4_0, 0.02),
                    (b + "attn_output", (heads * HEAD, hidden), Q4_0, 0.02 / depth),
                    (b + "ffn_gate_inp", (hidden, EXPERTS), F32, 0.5)]
        for suffix, count in (("exps", (EXPERTS,)), ("shexp", ())):
            tensors += [(f"{b}ffn_gate_{suffix}", (hidden, width, *count), Q4_0, 0.02),
                        (f"{b}ffn_up_{suffix}", (hidden, width, *count), Q4_0, 0.02),
                        (f"{b}ffn_down_{suffix}", (width, hidden, *count), Q4_0, 0.02 / depth)]

    def count(shape):
        values = 1
        for dimension in shape:
            values *= dimension
        return values

    def size(shape, kind):
        return count(shape) * 4 if kind == F32 else count(shape) // 32 * 18

    def padding(at):
        return -at % ALIGN

    infos, at = [], 0
    for name, shape, kind, _ in tensors:
        infos.append(text(name + ".weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, at))
        at += size(shape, kind)
        at += padding(at)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(infos)
    rng = random.Random(1)
    pool_blocks = 1 << 18
    pools = {}
    with open(out, "wb") as file:
        file.write(head + bytes(padding(len(head))))
        for name, shape, kind, sigma in tensors:
            if sigma is None:
                data = array.array("f", [1.0]) * count(shape)
                file.write(data.tobytes())
            elif kind == F32:
                file.write(array.array("f", (rng.gauss(0, sigma) for _ in range(count(shape)))).tobytes())
            else:
                pool = pools.setdefault(sigma, blocks(pool_blocks, sigma) if sigma not in pools else None)
                left = count(shape) // 32
                while left:
                    take = min(left, pool_blocks // 2)
                    start = rng.randrange(pool_blocks - take + 1)
                    file.write(pool[18 * start:18 * (start + take)])
                    left -= take
            file.write(bytes(padding(size(shape, kind))))
        file.flush()
        os.fsync(file.fileno())


main()
