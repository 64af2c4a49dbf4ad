"""The tokenizer of the `megrez` folder: a tiny byte-level BPE in Megrez layout."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BASE = 280
MEGREZ_SPECIALS = [
    "<|eos|>", "<|unk|>", "<|pad|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>", "<|code_start|>",
    "<|code_end|>", "<|function_start|>", "<|function_end|>", "<|image_start|>", "<|image_end|>", "<|audio_start|>",
    "<|audio_end|>",
]  # fmt: skip
# The pre-tokenisation of Qwen2, which Megrez uses.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "system user assistant observation the the there then other and an in on",
    "你好 你是 用户 问题 回答",
    "the answer is the sum of the numbers",
]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|role_start|>system<|role_end|>你是Megrez-3B-Instruct，将针对用户的问题给出详细的、积极的回答。<|turn_end|>' }}"
    "{% endif %}{{ '<|role_start|>' + message['role'] + '<|role_end|>' + message['content'] + '<|turn_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|role_start|>assistant<|role_end|>' }}{% endif %}"
)


def write_megrez_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == BASE
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MEGREZ_SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {
        str(BASE + i): dict(
            content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True
        )
        for i, t in enumerate(MEGREZ_SPECIALS)
    }
    settings = dict(
        add_bos_token=False,
        add_eos_token=False,
        added_tokens_decoder=added,
        bos_token=None,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        eos_token="<|turn_end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        model_max_length=256,
        tokenizer_class="PreTrainedTokenizerFast",
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    generation = dict(
        eos_token_id=[BASE + MEGREZ_SPECIALS.index(t) for t in ("<|turn_end|>", "<|eos|>")],
        pad_token_id=0,
        temperature=0.7,
        top_p=0.9,
        do_sample=True,
    )
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
