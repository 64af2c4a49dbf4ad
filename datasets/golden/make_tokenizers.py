"""Tiny tokenizers of several kinds with what transformers makes of some texts, in `tokenizers/`.

    pip install -r requirements.txt && python make_tokenizers.py

`cases.json` holds per kind and text the ids with and without special tokens around it (`ids`, `bare`), the ids when special
tokens in the text are read as text (`ordinary`), and the text of `ids` with and without special tokens.
"""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from make_tokenizer import write_megrez_tokenizer

HERE = Path(__file__).resolve().parent / "tokenizers"
TEXT = ["the answer is the sum of the numbers", "an other word and then the end", "你好 世界 问题 回答", "héllo wörld"] * 3
CASES = [
    "",
    "the answer",
    "  two  spaces\nand a line ",
    "你好，世界！问题？",
    "emoji 🦀👩‍👩‍👧 and é",
    "a</s>b<s> <|turn_end|>user<|role_end|>x",
    "\u0000\t\r\n",
    "0123456789 don't I'LL",
]


def byte_fallback():
    """As SentencePiece models are converted: metaspace by normaliser, bytes for unknown characters."""
    alphabet = sorted(set("".join(TEXT).replace(" ", "▁")) - set("界回"))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=3 + 256 + len(alphabet) + 30,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator([t.replace("界", "").replace("回", "") for t in TEXT], trainer)
    # The trainer marks its special tokens as added; the bytes must be plain vocabulary.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer, dict(unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer, dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def byte_level():
    """Byte-level with an added token that is no special one, one that eats spaces, and one of other characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<s>"), AddedToken("</s>", rstrip=True, lstrip=True)])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("two  spaces"), AddedToken("世界！")])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9, pad_id=290, pad_token="<s>")
    return tokenizer, dict(
        bos_token=dict(__type="AddedToken", content="<s>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True),
        eos_token="</s>",
        additional_special_tokens=["<s>"],
    )


def write(folder, tokenizer, settings):
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        text = json.dumps(dict(clean_up_tokenization_spaces=False, **settings), indent=1)
        (folder / "tokenizer_config.json").write_text(text + "\n")
    loaded = AutoTokenizer.from_pretrained(folder)
    cases = []
    for text in CASES:
        ids = loaded.encode(text)
        cases.append(
            dict(
                kind=folder.name,
                text=text,
                ids=ids,
                bare=loaded.encode(text, add_special_tokens=False),
                ordinary=loaded.encode(text, add_special_tokens=False, split_special_tokens=True),
                decoded=loaded.decode(ids, clean_up_tokenization_spaces=False),
                plain=loaded.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            )
        )
    print(f"{folder.name}: {len(loaded)} tokens")
    return cases, len(loaded)


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    kinds = {
        "byte-level": byte_level(),
        "byte-fallback": byte_fallback(),
        "word-piece": word_piece(),
        "unigram": unigram(),
        "megrez": (None, None),
    }
    # The same vocabulary in a class that rules by flags what stands around a text.
    tokenizer, settings = byte_fallback()
    flags = dict(tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=False, add_eos_token=True)
    kinds["flags"] = (tokenizer, {**settings, **flags})
    cases, sizes = [], {}
    for name, (tokenizer, settings) in kinds.items():
        folder = HERE / name
        folder.mkdir(parents=True)
        if settings is None:
            write_megrez_tokenizer(folder)
            (folder / "generation_config.json").unlink()
        else:
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        found, sizes[name] = write(folder, tokenizer, settings)
        cases += found
    head = dict(about="transformers 4.57.1, tokenizers 0.22.2", vocab_size=sizes)
    lines = json.dumps(head)[:-1] + ',\n"cases": [\n'
    lines += ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]}\n"
    (HERE / "cases.json").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
