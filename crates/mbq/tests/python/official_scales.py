"""Writes tests/fixtures/official: files of torch.save as the official code saves scales, sound ones and others.

python official_scales.py FOLDER [GOLDEN]

Channel i of operator n has scale 0.5 + (7 i + 3 n mod 16) / 8, which every floating dtype holds. GOLDEN is tests/golden, of which one
recorded run becomes a file too.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file

HIDDEN, INTERMEDIATE, LAYERS = 32, 48, 2
QWEN = [
    ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], HIDDEN),
    ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], HIDDEN),
    ("mlp.up_proj", ["mlp.down_proj"], INTERMEDIATE),
]
INTERN = [
    ("attention_norm", ["attention.wqkv"], HIDDEN),
    ("ffn_norm", ["feed_forward.w1", "feed_forward.w3"], HIDDEN),
    ("feed_forward.w3", ["feed_forward.w2"], INTERMEDIATE),
]


def scales(prefix="model.layers", ops=None, dtype=torch.float32, layers=LAYERS):
    found = []
    for layer in range(layers):
        for previous, linears, width in ops or QWEN:
            n = len(found)
            values = [0.5 + (7 * i + 3 * n) % 16 / 8 for i in range(width)]
            at = f"{prefix}.{layer}."
            found.append((at + previous, tuple(at + name for name in linears), torch.tensor(values, dtype=dtype)))
    return found


def main(folder, golden=None):
    folder = pathlib.Path(folder)

    def save(name, value):
        torch.save(value, folder / f"{name}.pt")

    save("qwen", {"scale": scales()})
    save("intern", {"scale": scales("language_model.model.layers", INTERN, torch.bfloat16)})
    save("half", {"scale": scales(dtype=torch.float16), "clip": []})

    def changed(n, change):
        found = scales()
        found[n] = change(*found[n])
        return {"scale": found}

    def put(value):
        def change(previous, linears, t):
            t[5] = value
            return previous, linears, t
        return change

    save("nan", changed(1, put(float("nan"))))
    save("zero", changed(4, put(0.0)))
    save("width", changed(0, lambda p, l, t: (p, l, t[:16].clone())))
    save("column", changed(2, lambda p, l, t: (p, l, t.view(-1, 1))))
    save("integers", changed(2, lambda p, l, t: (p, l, t.long())))
    save("previous", changed(2, lambda p, l, t: (p.replace("up", "gate"), l, t)))
    save("pair", changed(2, lambda p, l, t: (p, t)))
    save("parameter", changed(2, lambda p, l, t: (p, l, torch.nn.Parameter(t))))
    save("function", changed(2, lambda p, l, t: (p, l, print)))
    save("missing", {"scale": scales()[:-1]})
    save("twice", {"scale": scales() + scales()[:1]})
    save("deeper", {"scale": scales(layers=3)})
    save("tower", {"scale": scales("vision_tower.vision_model.encoder.layers")})
    save("clipped", {"scale": scales(), "clip": [("model.layers.0.mlp.down_proj", torch.ones(4, 1, 1))]})
    save("smooth", {"model.layers.0.self_attn.q_proj": torch.ones(HIDDEN)})
    save("list", scales())
    torch.save({"scale": scales()}, folder / "legacy.pt", _use_new_zipfile_serialization=False)

    if golden:
        run = pathlib.Path(golden) / "07_llama_w3_mae_rw"
        tensors = load_file(run.with_suffix(".safetensors"))
        ops = json.loads(run.with_suffix(".json").read_text())["ops"]
        save("golden", {"scale": [(op["prev_op"], tuple(op["layers"]), tensors[f"op{op['i']}.scales"]) for op in ops]})


main(*sys.argv[1:])
