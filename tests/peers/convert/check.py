"""python check.py SCOUTD FOLDER [ORACLE]: converts made-up checkpoints and compares with NumPy and the package gguf."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map, quants

from made_up import HEADS, KV, LAYERS, D, H, write

scoutd, work = sys.argv[1], Path(sys.argv[2])
oracle = Path(sys.argv[3]) if len(sys.argv) > 3 else None

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


made = write(work)
for name, arch in (("llama4", MODEL_ARCH.LLAMA4), ("llama", MODEL_ARCH.LLAMA)):
    folder, wanted = work / name, expected(made[name], arch)
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0", "q4_k", "q5_k", "q6_k", "auto"):
        compare(folder, wanted, kind)
kill_and_resume(work / "llama4")

if oracle is None:
    print("llama.cpp's converter: not compared, SCOUTD_ORACLE is not set")
else:
    for folder in ("tiny", "tiny-stock"):
        convert(oracle / folder, work / f"{folder}.gguf", "--type", "f32")
        ours = {t.name: t for t in GGUFReader(work / f"{folder}.gguf").tensors}
        theirs = {t.name: t for t in GGUFReader(oracle / folder / f"{folder}-f32.gguf").tensors}
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert list(ours[name].shape) == list(tensor.shape), name
            assert ours[name].data.tobytes() == tensor.data.tobytes(), name
        print(f"llama.cpp's converter: {folder}: {len(theirs)} tensors equal byte for byte")
