"""python check.py SCOUTD FOLDER [ORACLE]: converts made-up checkpoints and compares with NumPy and the package gguf."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map, quants

scoutd, work = sys.argv[1], Path(sys.argv[2])
oracle = Path(sys.argv[3]) if len(sys.argv) > 3 else None
rng = np.random.default_rng(7)

# --- checkpoints -----------------------------------------------------------------------------------------------------


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
    letters = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = {"model": {"type": "BPE", "vocab": letters, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


H, WIDTH, EXPERTS, VOCAB, LAYERS, HEADS, KV, D = 256, 512, 4, 64, 5, 4, 2, 64
common = dict(hidden_size=H, vocab_size=VOCAB, num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=D,
              num_key_value_heads=KV, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=500000.0,
              bos_token_id=1, eos_token_id=2)


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


# --- what must come out ----------------------------------------------------------------------------------------------


def expected(tensors, arch):
    """Name → F32 array as GGUF must hold it; names from the package's own table."""
    table = get_tensor_name_map(arch, LAYERS)
    out = {}
    for name, values in tensors.items():
        if name.endswith("gate_up_proj"):
            base = name.removesuffix("gate_up_proj")
            halves = np.split(values.transpose(0, 2, 1), 2, axis=1)
            for part, half in zip(("gate_proj", "up_proj"), halves):
                out[table.get_name(base + part) + ".weight"] = half
            continue
        if name.endswith("experts.down_proj"):
            out[table.get_name(name) + ".weight"] = values.transpose(0, 2, 1)
            continue
        if arch == MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            n = HEADS if "q_proj" in name else KV
            values = values.reshape(n, 2, D // 2, H).swapaxes(1, 2).reshape(values.shape)
        out[table.get_name(name, try_suffixes=(".weight",))] = values
    return {name: np.ascontiguousarray(values) for name, values in out.items()}


def convert(source, target, *options):
    command = [scoutd, "convert", str(source), "--out", str(target), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compare(folder, wanted, kind):
    target = folder.with_name(f"{folder.name}-{kind}.gguf")
    report = convert(folder, target, "--type", kind)
    found = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    losses = {tensor["name"]: tensor["rms_error"] for tensor in report["tensors"]}
    exact = 0
    for name, values in wanted.items():
        tensor = found[name]
        assert list(tensor.shape) == list(values.shape[::-1]), (name, tensor.shape, values.shape)
        if values.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            assert tensor.tensor_type == GGMLQuantizationType.F32, name
        elif kind != "auto":
            assert tensor.tensor_type.name.lower() == kind, (name, tensor.tensor_type.name)
        back = quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        rms = np.sqrt(np.mean((back - values) ** 2.0) / np.mean(values**2.0))
        assert abs(rms - losses[name]) <= 1e-4 * rms + 1e-9, (name, rms, losses[name])
        if tensor.tensor_type.name not in ("Q4_K", "Q5_K", "Q6_K"):
            assert quants.quantize(values, tensor.tensor_type).tobytes() == tensor.data.tobytes(), (kind, name)
            exact += 1
    print(f"{target.name}: {len(wanted)} tensors, {exact} byte for byte, RMS error {report['rms_error']:.5f} as reported")


def kill_and_resume(folder, options=("--type", "q4_k", "--threads", "1")):
    """Kills a conversion, and the resumed ones after it, then lets one finish and compares the bytes."""
    whole, broken = folder.with_name("whole.gguf"), folder.with_name("broken.gguf")
    started = time.monotonic()
    convert(folder, whole, *options)
    took = time.monotonic() - started
    killed = 0
    for share in (0.2, 0.35, 0.5):
        command = [scoutd, "convert", str(folder), "--out", str(broken), *options, *["--resume"] * (killed > 0)]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run.wait(took * share)
            break  # Faster than the first time: nothing left to kill.
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            killed += 1
            assert not broken.exists(), "half a file under the final name"
    assert killed > 0, "no run could be killed"
    report = {"resumed_pieces": "all"} if broken.exists() else convert(folder, broken, "--resume", *options)
    assert whole.read_bytes() == broken.read_bytes(), "a resumed file differs"
    print(f"killed {killed} times, resumed with {report['resumed_pieces']} pieces: the same bytes")


for maker, arch in ((llama4, MODEL_ARCH.LLAMA4), (llama, MODEL_ARCH.LLAMA)):
    config, tensors, stored = maker()
    folder = work / maker.__name__
    write_checkpoint(folder, config, stored, shards=3)
    wanted = expected(tensors, arch)
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0", "q4_k", "q5_k", "q6_k", "auto"):
        compare(folder, wanted, kind)
kill_and_resume(work / "llama4")

if oracle is None:
    print("llama.cpp's converter: not compared, SCOUTD_ORACLE is not set")
else:
    convert(oracle / "tiny", work / "tiny.gguf", "--type", "f32")
    ours = {t.name: t for t in GGUFReader(work / "tiny.gguf").tensors}
    theirs = {t.name: t for t in GGUFReader(oracle / "tiny" / "tiny-f32.gguf").tensors}
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert list(ours[name].shape) == list(tensor.shape), name
        assert ours[name].data.tobytes() == tensor.data.tobytes(), name
    print(f"llama.cpp's converter: {len(theirs)} tensors equal byte for byte")
