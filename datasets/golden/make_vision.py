"""Tiny random vision-language checkpoints, images, and what transformers makes of them.

    pip install -r requirements.txt && python make_vision.py [NAME ...]

Every folder of `vision/` holds config.json, preprocessor_config.json, model.safetensors (float16; everything is computed
from the upcast values), images as PNG, cases.json and expected.safetensors. Seeds are fixed. The script fails when a greedy
choice is so close that rounding could flip it.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

HERE = Path(__file__).resolve().parent / "vision"
NEW_TOKENS = 12
MIN_MARGIN = 5e-3
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
# The last ids are the marks.
IMAGE, VIDEO, START, END = 95, 94, 93, 92


def picture(seed, width, height):
    """Waves and noise: smooth enough for a resize to matter, sharp enough for it to overshoot."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for _ in range(3):
        a, b, c = rng.uniform(0.05, 0.5, 3)
        wave = np.sin(a * x + c * 9) * np.cos(b * y) * 90 + 128
        planes.append(wave + rng.normal(0, 25, (height, width)) + 70 * (rng.random((height, width)) < 0.05))
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


def randomise(model, generator):
    """Weights at which logits spread; norms, biases and scales that are not the identity. Rounded to float16."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        last = name.split(".")[-1]
        if last == "weight" and p.ndim == 1:
            p.data = 1.0 + 0.2 * noise
        elif last == "bias":
            p.data = 0.2 * noise
        elif "lambda" in last:
            p.data = 0.7 + 0.2 * noise
        elif "embed" in name and p.ndim <= 3:
            p.data = 0.5 * noise
        elif "lm_head" in name:
            p.data = 0.5 * noise
        elif p.ndim == 1:
            p.data = 0.5 * noise
        else:
            p.data = noise * 1.2 / p[0].numel() ** 0.5
        p.data = p.data.half().float()


def build(cls, cfg, seed):
    torch.manual_seed(0)
    cfg._attn_implementation = "eager"
    model = cls(cfg).eval().float()
    if cls is LlavaOnevisionForConditionalGeneration:
        # This release gives the normed output in place of the last hidden state, which the checkpoints were not trained
        # with; releases up to 4.51 do not.
        model.model.vision_tower.vision_model.post_layernorm.forward = lambda x: x
    randomise(model, torch.Generator().manual_seed(seed))
    model.tie_weights()
    return model


def text_ids(generator, n):
    return torch.randint(0, 90, (n,), generator=generator).tolist()


@torch.no_grad()
def run(model, ids, inputs):
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **inputs)
    best = torch.stack(made.scores)[:, 0].topk(2).values
    return out.logits[0].float(), made.sequences[0, ids.shape[1] :].tolist(), (best[:, 0] - best[:, 1]).min().item()


class Folder:
    def __init__(self, name):
        self.path = HERE / name
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        self.images = {}

    def image(self, name, picture):
        """Saves a picture once; gives what is in the file."""
        if name not in self.images:
            picture.save(self.path / name, optimize=True)
            self.images[name] = picture
        return self.images[name]

    def finish(self, config, preprocessor, state, cases, tensors, seed, margin, extra=None):
        (self.path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (self.path / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")
        for name, body in (extra or {}).items():
            (self.path / name).write_text(json.dumps(body, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in state.items()}, self.path / "model.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.path / "expected.safetensors")
        head = dict(
            about=f"{self.path.name}: transformers 4.57.1, torch {torch.__version__.split('+')[0]}, Pillow "
            f"{Image.__version__}, float32, eager attention",
            seed=seed,
            new_tokens=NEW_TOKENS,
            smallest_margin=margin,
            tolerance=dict(logits_relative=1e-4, pixels="exact", ids="exact", greedy="exact"),
        )
        lines = json.dumps(head)[:-1] + ',\n"cases": [\n' + ",\n".join(json.dumps(c) for c in cases) + "\n]}\n"
        (self.path / "cases.json").write_text(lines)
        size = sum(f.stat().st_size for f in self.path.iterdir())
        print(f"{self.path.name}: seed {seed}, smallest margin {margin:.4f}, {size >> 10} KiB")


def make(name, cls, cfg, prompts, preprocessor, saved=None, extra=None, more=None):
    """`prompts(folder)` gives (name, media, ids as written, ids expanded, pixels, inputs of the model) for each case."""
    for seed in range(1, 100):
        model = build(cls, cfg, seed)
        folder = Folder(name)
        cases, tensors, margins = [], dict(more or {}), []
        for number, (case, media, written, expanded, pixels, inputs) in enumerate(prompts(folder)):
            logits, greedy, margin = run(model, expanded, inputs)
            margins.append(margin)
            body = dict(name=case, media=media, ids=written, expanded=expanded, greedy=greedy)
            if hasattr(model.model, "get_rope_index") and inputs:
                grids = {k: v for k, v in inputs.items() if k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
                positions, delta = model.model.get_rope_index(torch.tensor([expanded]), **grids)
                body["positions"], body["delta"] = positions[:, 0].tolist(), delta.item()
            tensors[f"{number}.logits"] = logits
            for i, p in enumerate(pixels):
                tensors[f"{number}.pixels.{i}"] = p
            cases.append(body)
        if min(margins) > MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no seed keeps its greedy choices apart")
    if saved is None:
        model.save_pretrained(folder.path, safe_serialization=True)
        (folder.path / "generation_config.json").unlink(missing_ok=True)
        from safetensors.torch import load_file

        state = load_file(folder.path / "model.safetensors")
        config = json.loads((folder.path / "config.json").read_text())
    else:
        state, config = saved(model)
    folder.finish(config, preprocessor, state, cases, tensors, seed, min(margins), extra)


def one(name):
    return dict(image=name)


# ---------------------------------------------------------------------------------------------------------------- LLaVA


def llava():
    cfg = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            projection_dim=16,
        ),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    preprocessor = dict(
        crop_size=dict(height=28, width=28),
        do_center_crop=True,
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=CLIP_MEAN,
        image_processor_type="CLIPImageProcessor",
        image_std=CLIP_STD,
        resample=3,
        rescale_factor=1 / 255,
        size=dict(shortest_edge=28),
    )
    processor = CLIPImageProcessor(**{k: v for k, v in preprocessor.items() if k != "image_processor_type"})
    tokens = 16

    def prompts(folder):
        g = torch.Generator().manual_seed(5)
        wide, tall, small = picture(1, 61, 40), picture(2, 33, 70), picture(3, 28, 19)
        for case, names in [
            ("one image", ["wide.png"]),
            ("two images", ["tall.png", "small.png"]),
            ("text alone", []),
        ]:
            images = [folder.image(n, dict(zip(["wide.png", "tall.png", "small.png"], [wide, tall, small]))[n]) for n in names]
            written, expanded = text_ids(g, 4), []
            expanded = list(written)
            for _ in names:
                more = text_ids(g, 3)
                written += [IMAGE] + more
                expanded += [IMAGE] * tokens + more
            inputs, pixels = {}, []
            if images:
                values = processor(images, return_tensors="pt")["pixel_values"]
                inputs, pixels = dict(pixel_values=values), [v[None] for v in values]
            yield case, [one(n) for n in names], written, expanded, pixels, inputs

    make("llava", LlavaForConditionalGeneration, cfg, prompts, preprocessor)


# -------------------------------------------------------------------------------------------------------- LLaVA-OneVision


def onevision():
    pinpoints = [[20 * r, 20 * c] for r in range(1, 3) for c in range(1, 3)]
    cfg = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, tie_word_embeddings=True),
        vision_config=SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=20,
            patch_size=6,
            vision_use_head=False,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_aspect_ratio="anyres_max_3",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=True,
    )
    preprocessor = dict(
        do_convert_rgb=True,
        do_normalize=True,
        do_pad=True,
        do_rescale=True,
        do_resize=True,
        image_grid_pinpoints=pinpoints,
        image_mean=[0.5, 0.5, 0.5],
        image_processor_type="LlavaOnevisionImageProcessor",
        image_std=[0.5, 0.5, 0.5],
        resample=3,
        rescale_factor=1 / 255,
        size=dict(height=20, width=20),
    )
    processor = LlavaOnevisionImageProcessor(**{k: v for k, v in preprocessor.items() if k != "image_processor_type"})
    counter = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    counter.image_processor, counter.num_image_tokens, counter.vision_aspect_ratio = processor, 9, "anyres_max_3"

    def prompts(folder):
        g = torch.Generator().manual_seed(6)
        wide, tall = folder.image("wide.png", picture(11, 50, 30)), folder.image("tall.png", picture(12, 20, 66))
        big = folder.image("big.png", picture(15, 60, 57))
        frames = [folder.image(f"frame{i}.png", picture(20 + i, 36, 24)) for i in range(3)]
        # One image: the whole and its tiles; a margin at the top or at the left; too large a map.
        for case, name, image in [("wide", "wide.png", wide), ("tall", "tall.png", tall), ("shrunk", "big.png", big)]:
            out = processor([[image]], return_tensors="pt")
            count = counter._get_number_of_features(image.height, image.width, 20, 20)
            before, after = text_ids(g, 3), text_ids(g, 4)
            yield (
                case,
                [one(name)],
                before + [IMAGE] + after,
                before + [IMAGE] * count + after,
                [out["pixel_values"][0]],
                dict(pixel_values=out["pixel_values"], image_sizes=torch.tensor(out["image_sizes"])),
            )
        # Several images: a square each.
        out = processor([[wide, tall]], return_tensors="pt")
        a, b = text_ids(g, 2), text_ids(g, 3)
        yield (
            "several",
            [one("wide.png"), one("tall.png")],
            a + [IMAGE, IMAGE] + b,
            a + [IMAGE] * 20 + b,
            [v for v in out["pixel_values"]],
            dict(
                pixel_values=out["pixel_values"],
                image_sizes=torch.tensor(out["image_sizes"]),
                batch_num_images=torch.tensor([2]),
            ),
        )
        # A video: frames as SigLIP's processor treats them.
        values = torch.tensor(
            np.array(
                processor._preprocess(
                    [np.array(f) for f in frames],
                    do_resize=True,
                    size=(20, 20),
                    resample=3,
                    do_rescale=True,
                    rescale_factor=1 / 255,
                    do_normalize=True,
                    image_mean=[0.5] * 3,
                    image_std=[0.5] * 3,
                    input_data_format="channels_last",
                )
            )
        )
        a, b = text_ids(g, 2), text_ids(g, 3)
        yield (
            "video",
            [dict(video=[f"frame{i}.png" for i in range(3)], interval=0.5)],
            a + [VIDEO] + b,
            a + [VIDEO] * (3 * 4 + 1) + b,
            [values],
            dict(pixel_values_videos=values[None]),
        )

    # Tokens of an image alone, for many sizes: height, width, tokens.
    rng = np.random.default_rng(9)
    sizes = [(1, 1), (1, 90), (90, 1), (20, 20), (40, 40), (41, 39)] + rng.integers(1, 130, (150, 2)).tolist()
    tokens = [(h, w, counter._get_number_of_features(h, w, 20, 20)) for h, w in sizes]
    more = dict(tokens=torch.tensor(tokens))
    make("llava-onevision", LlavaOnevisionForConditionalGeneration, cfg, prompts, preprocessor, more=more)


# ------------------------------------------------------------------------------------------------------------------ Qwen


def qwen(name, cls, cfg):
    preprocessor = dict(
        do_convert_rgb=True,
        do_normalize=True,
        do_rescale=True,
        do_resize=True,
        image_mean=CLIP_MEAN,
        image_processor_type="Qwen2VLImageProcessor",
        image_std=CLIP_STD,
        max_pixels=1536,
        merge_size=2,
        min_pixels=512,
        patch_size=4,
        resample=3,
        rescale_factor=1 / 255,
        temporal_patch_size=2,
    )
    processor = Qwen2VLImageProcessor(**{k: v for k, v in preprocessor.items() if k != "image_processor_type"})

    def image_inputs(images):
        out = processor(images, return_tensors="pt")
        grids = out["image_grid_thw"]
        return out["pixel_values"], grids, [int(g.prod()) // 4 for g in grids]

    def video_inputs(frames):
        # qwen_vl_utils' range: 128 to 768 tokens a frame, and never less than 1.05 times the least.
        least, most = 128 * 64, 768 * 64
        most = max(min(most, int(128000 * 64 * 0.9) / len(frames) * 2), int(least * 1.05))
        h, w = smart_resize(frames[0].height, frames[0].width, 8, least, most)
        sized = [f.resize((w, h), Image.BICUBIC) for f in frames]
        values, grid = processor._preprocess(
            sized,
            do_resize=False,
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=CLIP_MEAN,
            image_std=CLIP_STD,
            patch_size=4,
            temporal_patch_size=2,
            merge_size=2,
            do_convert_rgb=True,
        )
        return torch.tensor(values), torch.tensor([grid])

    def prompts(folder):
        g = torch.Generator().manual_seed(7)
        wide, tall = folder.image("wide.png", picture(31, 45, 22)), folder.image("tall.png", picture(32, 18, 60))
        values, grids, counts = image_inputs([wide])
        a, b = text_ids(g, 3) + [START], [END] + text_ids(g, 4)
        yield (
            "one image",
            [one("wide.png")],
            a + [IMAGE] + b,
            a + [IMAGE] * counts[0] + b,
            [values],
            dict(pixel_values=values, image_grid_thw=grids),
        )
        values, grids, counts = image_inputs([tall, wide])
        a, b, c = [START], [END] + text_ids(g, 3) + [START], [END] + text_ids(g, 2)
        cut = int(grids[0].prod())
        yield (
            "two images",
            [one("tall.png"), one("wide.png")],
            a + [IMAGE] + b + [IMAGE] + c,
            a + [IMAGE] * counts[0] + b + [IMAGE] * counts[1] + c,
            [values[:cut], values[cut:]],
            dict(pixel_values=values, image_grid_thw=grids),
        )
        a = text_ids(g, 6)
        yield "text alone", [], a, a, [], {}

    make(name, cls, cfg, prompts, preprocessor)


VISION = dict(patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
MARKS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
MROPE = dict(rope_theta=1e4, rope_scaling=dict(type="mrope", mrope_section=[1, 2, 1]))


def qwen2_vl():
    vision = dict(VISION, depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2)
    cfg = Qwen2VLConfig(text_config=dict(TEXT, **MROPE), vision_config=vision, **MARKS)
    qwen("qwen2-vl", Qwen2VLForConditionalGeneration, cfg)


def qwen2_5_vl():
    vision = dict(
        VISION,
        depth=3,
        hidden_size=32,
        out_hidden_size=32,
        intermediate_size=44,
        num_heads=2,
        window_size=16,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    cfg = Qwen2_5_VLConfig(text_config=dict(TEXT, **MROPE), vision_config=vision, **MARKS)
    qwen("qwen2.5-vl", Qwen2_5_VLForConditionalGeneration, cfg)


# ------------------------------------------------------------------------------------------------------------- InternVL2


def tiles(image, edge, most):
    """The tiles of the model card's `dynamic_preprocess` with a thumbnail."""
    ratios = sorted(
        {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if 1 <= i * j <= most}, key=lambda r: r[0] * r[1]
    )
    aspect, best, nearest = image.width / image.height, (1, 1), math.inf
    for ratio in ratios:
        distance = abs(aspect - ratio[0] / ratio[1])
        if distance < nearest:
            best, nearest = ratio, distance
        elif distance == nearest and image.width * image.height > 0.5 * edge * edge * ratio[0] * ratio[1]:
            best = ratio
    large = image.resize((edge * best[0], edge * best[1]))
    out = [
        large.crop((c * edge, r * edge, (c + 1) * edge, (r + 1) * edge)) for r in range(best[1]) for c in range(best[0])
    ]
    return out + [image.resize((edge, edge))] if len(out) > 1 else out


def normalised(images, edge):
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    return torch.stack(
        [
            (torch.from_numpy(np.array(i.resize((edge, edge)))).permute(2, 0, 1).contiguous().float().div(255) - mean) / std
            for i in images
        ]
    )


def internvl2():
    text = dict(TEXT, rope_scaling=dict(rope_type="dynamic", factor=2.0), max_position_embeddings=64)
    cfg = InternVLConfig(
        text_config=LlamaConfig(**text),
        vision_config=InternVLVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[32, 32],
            patch_size=[8, 8],
            attention_bias=True,
            layer_norm_eps=1e-6,
            norm_type="layer_norm",
            use_mean_pooling=True,
            use_absolute_position_embeddings=True,
            hidden_act="gelu",
        ),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )

    def saved(model):
        """Under the names and in the layout of OpenGVLab's files."""
        s, out = model.state_dict(), {}
        v = {k.split("vision_tower.")[1]: t for k, t in s.items() if "vision_tower." in k}
        out["vision_model.embeddings.class_embedding"] = v["embeddings.cls_token"]
        out["vision_model.embeddings.position_embedding"] = v["embeddings.position_embeddings"]
        for part in ["weight", "bias"]:
            out[f"vision_model.embeddings.patch_embedding.{part}"] = v[
                f"embeddings.patch_embeddings.projection.{part}"
            ]
        for l in range(cfg.vision_config.num_hidden_layers):
            a, b = f"encoder.layer.{l}.", f"vision_model.encoder.layers.{l}."
            for part in ["weight", "bias"]:
                out[f"{b}attn.qkv.{part}"] = torch.cat([v[f"{a}attention.{x}_proj.{part}"] for x in "qkv"])
                out[f"{b}attn.proj.{part}"] = v[f"{a}attention.projection_layer.{part}"]
                out[f"{b}norm1.{part}"] = v[f"{a}layernorm_before.{part}"]
                out[f"{b}norm2.{part}"] = v[f"{a}layernorm_after.{part}"]
                for fc in ["fc1", "fc2"]:
                    out[f"{b}mlp.{fc}.{part}"] = v[f"{a}mlp.{fc}.{part}"]
            out[f"{b}ls1"], out[f"{b}ls2"] = v[f"{a}lambda_1"], v[f"{a}lambda_2"]
        p = {k.split("multi_modal_projector.")[1]: t for k, t in s.items() if "multi_modal_projector." in k}
        for part in ["weight", "bias"]:
            out[f"mlp1.0.{part}"] = p[f"layer_norm.{part}"]
            out[f"mlp1.1.{part}"] = p[f"linear_1.{part}"]
            out[f"mlp1.3.{part}"] = p[f"linear_2.{part}"]
        t = {k.split("language_model.")[1]: x for k, x in s.items() if "language_model." in k}
        to = "language_model.model."
        out[f"{to}tok_embeddings.weight"], out[f"{to}norm.weight"] = t["embed_tokens.weight"], t["norm.weight"]
        out["language_model.output.weight"] = s["lm_head.weight"]
        d, kv, group = 8, 2, 2
        for l in range(TEXT["num_hidden_layers"]):
            a, b = f"layers.{l}.", f"{to}layers.{l}."
            q = t[f"{a}self_attn.q_proj.weight"].view(kv, group, d, -1)
            k = t[f"{a}self_attn.k_proj.weight"].view(kv, 1, d, -1)
            w = t[f"{a}self_attn.v_proj.weight"].view(kv, 1, d, -1)
            out[f"{b}attention.wqkv.weight"] = torch.cat([q, k, w], 1).reshape((group + 2) * kv * d, -1)
            out[f"{b}attention.wo.weight"] = t[f"{a}self_attn.o_proj.weight"]
            for own, theirs in [("w1", "gate"), ("w3", "up"), ("w2", "down")]:
                out[f"{b}feed_forward.{own}.weight"] = t[f"{a}mlp.{theirs}_proj.weight"]
            out[f"{b}attention_norm.weight"] = t[f"{a}input_layernorm.weight"]
            out[f"{b}ffn_norm.weight"] = t[f"{a}post_attention_layernorm.weight"]
        config = dict(
            architectures=["InternVLChatModel"],
            downsample_ratio=0.5,
            dynamic_image_size=True,
            force_image_size=32,
            llm_config=dict(
                {k: v for k, v in TEXT.items() if v is not None},
                architectures=["InternLM2ForCausalLM"],
                bias=False,
                hidden_act="silu",
                max_position_embeddings=64,
                model_type="internlm2",
                rope_scaling=dict(factor=2.0, type="dynamic"),
                rope_theta=10000.0,
                tie_word_embeddings=False,
            ),
            max_dynamic_patch=6,
            min_dynamic_patch=1,
            model_type="internvl_chat",
            ps_version="v2",
            select_layer=-1,
            use_thumbnail=True,
            vision_config=dict(
                architectures=["InternVisionModel"],
                hidden_act="gelu",
                hidden_size=24,
                image_size=32,
                intermediate_size=40,
                layer_norm_eps=1e-6,
                norm_type="layer_norm",
                num_attention_heads=2,
                num_hidden_layers=2,
                patch_size=8,
                qk_normalization=False,
                qkv_bias=True,
            ),
        )
        return out, config

    def prompts(folder):
        g = torch.Generator().manual_seed(8)
        wide, square = folder.image("wide.png", picture(41, 90, 50)), folder.image("square.png", picture(42, 30, 31))
        for case, names, images in [("tiles", ["wide.png"], [wide]), ("two images", ["square.png", "wide.png"], [square, wide])]:
            pixels = [normalised(tiles(i, 32, 6), 32) for i in images]
            written, expanded = text_ids(g, 3), []
            expanded = list(written)
            for p in pixels:
                more = text_ids(g, 2)
                written += [START, IMAGE, END] + more
                expanded += [START] + [IMAGE] * (4 * len(p)) + [END] + more
            yield case, [one(n) for n in names], written, expanded, pixels, dict(pixel_values=torch.cat(pixels))
        frames = [folder.image(f"frame{i}.png", picture(50 + i, 40, 26)) for i in range(2)]
        pixels = normalised(frames, 32)
        written, expanded = text_ids(g, 2), []
        expanded = list(written)
        for _ in frames:
            more = text_ids(g, 2)
            written += more + [START, IMAGE, END]
            expanded += more + [START] + [IMAGE] * 4 + [END]
        more = text_ids(g, 3)
        yield (
            "frames",
            [dict(video=["frame0.png", "frame1.png"], interval=1.0)],
            written + more,
            expanded + more,
            [pixels],
            dict(pixel_values=pixels),
        )

    rng = np.random.default_rng(10)
    sizes = [(1, 1), (1, 90), (90, 1), (32, 32), (64, 64), (96, 64)] + rng.integers(1, 130, (150, 2)).tolist()
    added = {str(IMAGE): dict(content="<IMG_CONTEXT>", special=True), str(START): dict(content="<img>", special=True)}
    make(
        "internvl2",
        InternVLForConditionalGeneration,
        cfg,
        prompts,
        dict(do_normalize=True, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD),
        saved,
        {"tokenizer_config.json": dict(added_tokens_decoder=added)},
        # Pictures of an image, for many sizes: height, width, pictures.
        dict(pictures=torch.tensor([(h, w, len(tiles(Image.new("RGB", (w, h)), 32, 6))) for h, w in sizes])),
    )


# -------------------------------------------------------------------------------------------------------------- Pictures


def pictures():
    """Files of every kind with what Pillow reads from them, and one image resized by every filter."""
    path = HERE / "pictures"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    rgb = picture(61, 23, 17)
    alpha = Image.fromarray((np.arange(17 * 23).reshape(17, 23) * 5 % 256).astype(np.uint8))
    clear = rgb.convert("RGBA")
    clear.putalpha(alpha)
    grey = rgb.convert("L")
    both = Image.merge("LA", (grey, alpha))
    palette = rgb.quantize(16)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "rgb.png": (rgb, {}),
        "rgba.png": (clear, {}),
        "grey.png": (grey, {}),
        "grey-alpha.png": (both, {}),
        "palette.png": (palette, {}),
        "palette-clear.png": (palette, dict(transparency=3)),
        "two.png": (grey.convert("1"), {}),
        "deep.png": (Image.fromarray((np.asarray(grey).astype(np.uint16) * 257 + 77)), {}),
        "plain.bmp": (rgb, {}),
        "plain.gif": (palette, {}),
        "lossless.webp": (rgb, dict(lossless=True)),
        "clear.webp": (clear, dict(lossless=True, exact=True)),
        "turned.png": (rgb, dict(exif=turned)),
        "photo.jpg": (rgb, dict(quality=92, subsampling=0)),
        "turned.jpg": (rgb, dict(quality=92, subsampling=0, exif=turned)),
    }
    tensors = {}
    for name, (image, options) in files.items():
        image.save(path / name, **options)
        # As transformers' `load_image`.
        read = ImageOps.exif_transpose(Image.open(path / name))
        if name == "deep.png":
            # Pillow clips what is above 255; the high byte is what its RGB files of 16 bits give.
            tensors[name] = torch.from_numpy(np.repeat((np.asarray(read) >> 8).astype(np.uint8)[..., None], 3, -1).copy())
        else:
            tensors[name] = torch.from_numpy(np.array(read.convert("RGB")))
    sizes = [(40, 30), (11, 9), (23, 40), (7, 17), (23, 17), (1, 1)]
    for filter in [1, 2, 3, 4, 5]:
        for width, height in sizes:
            tensors[f"resize.{filter}.{width}x{height}"] = torch.from_numpy(
                np.array(rgb.resize((width, height), Image.Resampling(filter)))
            )
    save_file(tensors, path / "expected.safetensors")
    print(f"pictures: {sum(f.stat().st_size for f in path.iterdir()) >> 10} KiB")


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    chosen = sys.argv[1:]
    for maker in [llava, onevision, qwen2_vl, qwen2_5_vl, internvl2, pictures]:
        if not chosen or maker.__name__ in chosen:
            maker()
