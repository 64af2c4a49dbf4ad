"""What transformers' logits processors make of random logits, in `sampling/`.

    pip install -r requirements.txt && python make_sampling.py

The processors and their order are those that `generate` puts together (`_get_logits_processor`), asked with the settings of
each case. `sampling.safetensors` holds the rows `logits.N` and, per case, `M.out` (removed tokens are -inf) and `M.probs`
(their softmax); `cases.json` holds settings, context ids and the names of the processors in order.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessorList

HERE = Path(__file__).resolve().parent / "sampling"
VOCABULARY = 64
TIED = 1
SETTINGS = [
    dict(temperature=0.7),
    dict(temperature=1.5, repetition_penalty=1.3),
    dict(top_k=5),
    dict(top_k=1, temperature=2.0),
    dict(top_k=1000),
    dict(top_p=0.9),
    dict(top_p=0.05),
    dict(top_p=0.5, temperature=3.0),
    dict(min_p=0.1),
    dict(min_p=0.5, temperature=0.5),
    dict(repetition_penalty=2.0),
    dict(repetition_penalty=0.5),
    dict(temperature=0.7, top_k=20, top_p=0.9),
    dict(temperature=1.3, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.1),
    dict(temperature=0.2, top_k=3, top_p=0.95, min_p=0.3, repetition_penalty=1.02),
    dict(),
]


def rows(generator):
    plain = torch.randn(4, VOCABULARY, generator=generator) * 3
    # The fifth largest logit is shared by three tokens: top-k keeps all of them.
    order = plain[TIED].argsort(descending=True)
    plain[TIED][order[4:7]] = plain[TIED][order[4]].item()
    # One token has all the mass; another row is nearly even.
    plain[2][17] = 60.0
    plain[3] *= 0.01
    return plain


def main():
    generator = torch.Generator().manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    logits = rows(generator)
    tensors = {f"logits.{i}": row.clone() for i, row in enumerate(logits)}
    cases = []
    for settings in SETTINGS:
        for row in range(len(logits)):
            # Which of several equal logits top-p keeps is up to the sort, which promises no order.
            if row == TIED and "top_p" in settings:
                continue
            # Repeated ids count once.
            context = torch.randint(0, VOCABULARY, (12,), generator=generator)
            context[3] = context[0]
            config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
            processors = model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=len(context),
                encoder_input_ids=None,
                prefix_allowed_tokens_fn=None,
                logits_processor=LogitsProcessorList(),
                device="cpu",
            )
            out = processors(context[None], logits[row][None].clone())[0]
            name = str(len(cases))
            tensors[f"{name}.out"], tensors[f"{name}.probs"] = out, out.softmax(-1)
            order = [type(p).__name__ for p in processors]
            cases.append(
                dict(row=row, context=context.tolist(), settings=settings, order=order, out=f"{name}.out", probs=f"{name}.probs")
            )
    HERE.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "sampling.safetensors")
    head = dict(about="transformers 4.57.1, torch 2.11.0, float32", tolerance=1e-6)
    lines = json.dumps(head)[:-1] + ',\n"cases": [\n' + ",\n".join(json.dumps(c) for c in cases) + "\n]}\n"
    (HERE / "cases.json").write_text(lines)
    print(f"{len(cases)} cases; the longest order is {max((c['order'] for c in cases), key=len)}")


if __name__ == "__main__":
    main()
