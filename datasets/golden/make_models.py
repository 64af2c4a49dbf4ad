"""Tiny random checkpoints and what transformers computes with them.

    pip install -r requirements.txt && python make_models.py [NAME ...]

Every folder holds config.json, model.safetensors (float32), cases.json and expected.safetensors. Seeds are fixed, so a
second run on the same machine gives the same bytes. The script fails when a feature that a folder is there for (a window,
a rope scaling) does not change the logits, and when a greedy choice is so close that rounding could flip it.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config

from make_tokenizer import MEGREZ_SPECIALS, write_megrez_tokenizer

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 64
# Smallest gap between the best and the second logit that a greedy path may pass.
MIN_MARGIN = 2e-3

SMALL = dict(
    vocab_size=256,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def config(cls, **changes):
    return cls(**{**SMALL, **changes})


# name -> (config, prompt lengths, the field whose absence must change the logits of the last prompt)
def folders():
    ropes = {
        "llama-linear": dict(rope_type="linear", factor=2.0),
        "llama-dynamic": dict(rope_type="dynamic", factor=4.0),
        "llama-yarn": dict(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=32.0, beta_slow=1.0
        ),
        "llama-llama3": dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    }
    out = {
        "llama": (config(LlamaConfig), [1, 7, 23, 70], None),
        "llama-bias": (
            config(
                LlamaConfig, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
            ),
            [1, 7, 23],
            None,
        ),
        "llama-linear": (config(LlamaConfig, rope_scaling=ropes["llama-linear"]), [1, 7, 23, 70], "rope_scaling"),
        # The original context is 96 here: greedy runs stay below it, the last prompt goes beyond.
        "llama-dynamic": (
            config(LlamaConfig, max_position_embeddings=96, rope_scaling=ropes["llama-dynamic"]),
            [1, 7, 23, 96, 130],
            "rope_scaling",
        ),
        "llama-yarn": (
            config(LlamaConfig, max_position_embeddings=128, rope_scaling=ropes["llama-yarn"]),
            [1, 7, 23, 60],
            "rope_scaling",
        ),
        "llama-llama3": (
            config(LlamaConfig, rope_theta=500.0, rope_scaling=ropes["llama-llama3"]),
            [1, 7, 23, 60],
            "rope_scaling",
        ),
        "qwen2": (
            config(Qwen2Config, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6),
            [1, 7, 23, 70],
            None,
        ),
        # Layers 2 and up look back 12 tokens only.
        "qwen2-window": (
            config(
                Qwen2Config,
                num_hidden_layers=4,
                intermediate_size=64,
                use_sliding_window=True,
                sliding_window=12,
                max_window_layers=2,
            ),
            [1, 7, 12, 23, 40],
            "sliding_window",
        ),
        "qwen3": (config(Qwen3Config, head_dim=20, rope_theta=1e6, rms_norm_eps=1e-6), [1, 7, 23, 70], None),
        "megrez": (
            config(
                LlamaConfig,
                vocab_size=320,
                hidden_size=64,
                num_attention_heads=8,
                rope_theta=5e6,
                eos_token_id=280 + MEGREZ_SPECIALS.index("<|turn_end|>"),
                pad_token_id=0,
            ),
            [1, 7, 23, 70],
            None,
        ),
    }
    return out


def randomise(model, generator):
    """Weights at which logits spread, norms and biases that are not the identity."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            p.data = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            p.data = 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            p.data = 0.5 * noise
        else:
            p.data = noise * 1.2 / p.shape[1] ** 0.5


def build(cfg, seed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval().float()
    randomise(model, torch.Generator().manual_seed(seed))
    model.tie_weights()
    return model


@torch.no_grad()
def forward(model, ids):
    out = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    # The last entry is after the final norm.
    return out.logits[0].float(), out.hidden_states[-1][0].float()


@torch.no_grad()
def greedy(model, ids):
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), generation_config=settings
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    best = torch.stack(out.scores)[:, 0].topk(2).values
    return tokens, (best[:, 0] - best[:, 1]).min().item()


def make(name, cfg, lengths, feature):
    limit = cfg.max_position_embeddings
    for seed in range(1, 200):
        model = build(cfg, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        cases, tensors, margins = [], {}, []
        for number, length in enumerate(lengths):
            ids = torch.randint(0, cfg.vocab_size, (length,), generator=generator).tolist()
            # A fresh model for each prompt: dynamic scaling keeps state between calls.
            model = build(cfg, seed)
            logits, hidden = forward(model, ids)
            case = dict(name=f"{length}-tokens", ids=ids, logits=f"{number}.logits", hidden=f"{number}.hidden")
            tensors[f"{number}.logits"], tensors[f"{number}.hidden"] = logits, hidden
            if length + NEW_TOKENS <= limit:
                case["greedy"], margin = greedy(build(cfg, seed), ids)
                margins.append(margin)
            else:
                case["greedy"] = None
            cases.append(case)
        distinct = len({t for c in cases if c["greedy"] for t in c["greedy"]})
        if min(margins) > MIN_MARGIN and distinct > 40:
            break
    else:
        raise SystemExit(f"{name}: no seed keeps its greedy choices apart")

    if feature:
        plain = type(cfg).from_dict({**cfg.to_dict(), feature: None, "layer_types": None, "use_sliding_window": False})
        changed = (forward(build(plain, seed), cases[-1]["ids"])[0] - tensors[f"{len(lengths) - 1}.logits"]).abs().max()
        if changed < 0.1:
            raise SystemExit(f"{name}: without {feature} the logits differ by {changed} only")

    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = build(cfg, seed)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored, indent=1) + "\n")
    if name == "megrez":
        write_megrez_tokenizer(folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    body = dict(
        about=f"{name}: transformers 4.57.1, torch {torch.__version__.split('+')[0]}, float32, eager attention",
        seed=seed,
        new_tokens=NEW_TOKENS,
        smallest_margin=min(margins),
        tolerance=dict(logits_relative=1e-4, hidden_relative=1e-4, greedy="exact"),
        cases=cases,
    )
    write_cases(folder / "cases.json", body)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: seed {seed}, smallest margin {min(margins):.4f}, {distinct} distinct tokens, {size >> 10} KiB")


def write_cases(path, body):
    """JSON with one case a line."""
    head = {k: v for k, v in body.items() if k != "cases"}
    lines = json.dumps(head, ensure_ascii=False)[:-1] + ',\n"cases": [\n'
    lines += ",\n".join(json.dumps(c, ensure_ascii=False) for c in body["cases"]) + "\n]}\n"
    path.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    for name, (cfg, lengths, feature) in folders().items():
        if not chosen or name in chosen:
            make(name, cfg, lengths, feature)
