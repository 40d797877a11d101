"""Made-up checkpoints of Llama 4 and Llama: small, random weights on the BF16 grid, a vocabulary of letters and digits.

    python made_up.py FOLDER      # writes FOLDER/llama4 and FOLDER/llama
"""

import json
import string
import sys
from pathlib import Path

import numpy as np

rng = np.random.default_rng(7)


def bf16(shape, scale=0.05):
    """Random values on the BF16 grid, as F32."""
    values = (rng.standard_normal(shape) * scale).astype(np.float32)
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_safetensors(path, tensors):
    header, data, at = {}, [], 0
    for name, values in tensors.items():
        raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
        at += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def write_checkpoint(folder, config, tensors, shards):
    folder.mkdir()
    names, index = list(tensors), {}
    for shard in range(shards):
        part = names[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    texts = [*string.ascii_letters, *string.digits[:7], "th", "in", "er"]
    added = [{"id": len(texts) + i, "content": text, "special": True} for i, text in enumerate(("<s>", "</s>"))]
    bpe = {"type": "BPE", "vocab": {text: i for i, text in enumerate(texts)}, "merges": ["t h", "i n", "e r"]}
    tokenizer = {"model": bpe, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


H, WIDTH, EXPERTS, VOCAB, LAYERS, HEADS, KV, D = 256, 512, 4, 64, 5, 4, 2, 64
common = dict(hidden_size=H, vocab_size=VOCAB, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=D,
              num_key_value_heads=KV, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=500000.0,
              bos_token_id=62, eos_token_id=63)


def attention(prefix):
    yield f"{prefix}.input_layernorm.weight", bf16(H)
    yield f"{prefix}.post_attention_layernorm.weight", bf16(H)
    for name, rows, cols in [("q", HEADS * D, H), ("k", KV * D, H), ("v", KV * D, H), ("o", H, HEADS * D)]:
        yield f"{prefix}.self_attn.{name}_proj.weight", bf16((rows, cols))


def dense(prefix):
    for name, rows, cols in [("gate", WIDTH, H), ("up", WIDTH, H), ("down", H, WIDTH)]:
        yield f"{prefix}.{name}_proj.weight", bf16((rows, cols))


def ends():
    yield "model.embed_tokens.weight", bf16((VOCAB, H))
    yield "lm_head.weight", bf16((VOCAB, H))
    yield "model.norm.weight", bf16(H)


def llama4():
    config = dict(architectures=["Llama4ForConditionalGeneration"], text_config=dict(
        common, intermediate_size=WIDTH, intermediate_size_mlp=2 * WIDTH, num_local_experts=EXPERTS,
        num_experts_per_tok=1, interleave_moe_layer_step=1, use_qk_norm=True))
    tensors = dict(ends())
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors.update(attention(prefix))
        tensors.update(dense(f"{prefix}.feed_forward.shared_expert"))
        tensors[f"{prefix}.feed_forward.router.weight"] = bf16((EXPERTS, H))
        tensors[f"{prefix}.feed_forward.experts.gate_up_proj"] = bf16((EXPERTS, H, 2 * WIDTH))
        tensors[f"{prefix}.feed_forward.experts.down_proj"] = bf16((EXPERTS, WIDTH, H))
    stored = {f"language_model.{name}": values for name, values in tensors.items()}
    stored["vision_model.patch_embedding.weight"] = bf16((8, 8))
    return config, tensors, stored


def llama():
    config = dict(common, architectures=["LlamaForCausalLM"], intermediate_size=WIDTH)
    tensors = dict(ends())
    for layer in range(LAYERS):
        tensors.update(attention(f"model.layers.{layer}"))
        tensors.update(dense(f"model.layers.{layer}.mlp"))
    return config, tensors, tensors


def write(folder):
    """Writes both; for each its folder and the tensors it holds, under the names of a text-only checkpoint."""
    made = {}
    for maker in (llama4, llama):
        config, tensors, stored = maker()
        write_checkpoint(folder / maker.__name__, config, stored, shards=3)
        made[maker.__name__] = tensors
    return made


if __name__ == "__main__":
    write(Path(sys.argv[1]))
