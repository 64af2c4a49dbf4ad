"""Loads an exported checkpoint with transformers on the CPU and holds its logits against ours.

    python load_export.py EXPORT EXPECTED [--within 1e-3]

EXPECTED is a safetensors file: `ids`, int64 [tokens], and `logits`, float32 [tokens, vocab]; with `pixel_values` where the
model sees. Needs torch, safetensors, transformers from 5 on (`dequantize=True`) and compressed-tensors, all from PyPI.
"""

import argparse

import torch
import transformers
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("export")
parser.add_argument("expected")
parser.add_argument("--within", type=float, default=1e-3)
args = parser.parse_args()

expected = load_file(args.expected)
ids, logits = expected["ids"][None], expected["logits"]
config = transformers.AutoConfig.from_pretrained(args.export)
sees = hasattr(config, "vision_config")
kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
model = kind.from_pretrained(
    args.export,
    dtype=torch.float32,
    quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
)
model.eval()
more = {"pixel_values": expected["pixel_values"]} if sees else {}
with torch.no_grad():
    found = model(input_ids=ids, **more).logits[0]
if found.shape != logits.shape:
    raise SystemExit(f"logits are {list(found.shape)}, expected {list(logits.shape)}")
off = (found - logits).abs().max().item()
print(f"transformers {transformers.__version__}: logits off by {off:.2e} of {logits.abs().max().item():.2f}")
if not off <= args.within:
    raise SystemExit(1)
