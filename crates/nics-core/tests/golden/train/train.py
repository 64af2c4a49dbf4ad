"""Writes train.json: what torch and transformers make of a few optimiser steps, a clipping and a schedule.

Runs on torch 2.11.0 and transformers 4.57.1 from PyPI:  python train.py
"""
import json
import pathlib

import torch
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

torch.manual_seed(20240607)
FIELDS = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def flat(t):
    return t.detach().to(torch.float64).flatten().tolist()


def adamw():
    """Five steps over a matrix (decayed) and a bias (not decayed), the learning rate changing at every step."""
    w = torch.nn.Parameter(torch.randn(3, 4))
    b = torch.nn.Parameter(torch.randn(4))
    case = dict(
        beta1=FIELDS["betas"][0],
        beta2=FIELDS["betas"][1],
        eps=FIELDS["eps"],
        weight_decay=0.1,
        shapes=dict(w=[3, 4], b=[4]),
        start=dict(w=flat(w), b=flat(b)),
        steps=[],
    )
    groups = [dict(params=[w], weight_decay=0.1), dict(params=[b], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, **FIELDS, foreach=False, fused=False)
    for step in range(5):
        lr = FIELDS["lr"] * (step + 1)
        for group in opt.param_groups:
            group["lr"] = lr
        w.grad, b.grad = torch.randn(3, 4), torch.randn(4) * 0.1
        if step == 3:
            b.grad = None  # an unused parameter: torch leaves it and its moments alone
        grads = dict(w=flat(w.grad), b=None if b.grad is None else flat(b.grad))
        opt.step()
        state = {n: opt.state[p] for n, p in dict(w=w, b=b).items()}
        case["steps"].append(
            dict(
                lr=lr,
                grads=grads,
                params=dict(w=flat(w), b=flat(b)),
                m={n: flat(s["exp_avg"]) for n, s in state.items()},
                v={n: flat(s["exp_avg_sq"]) for n, s in state.items()},
            )
        )
    return case


def clip():
    """clip_grad_norm_ over two tensors, once biting and once not."""
    cases = []
    for max_norm in (0.5, 1.0, 100.0):
        ps = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2, 3))]
        ps[0].grad, ps[1].grad = torch.randn(5), torch.randn(2, 3) * 2
        grads = [flat(p.grad) for p in ps]
        norm = torch.nn.utils.clip_grad_norm_(ps, max_norm).item()
        cases.append(dict(max_norm=max_norm, grads=grads, norm=norm, clipped=[flat(p.grad) for p in ps]))
    return cases


def schedule():
    """get_cosine_with_min_lr_schedule_with_warmup: the factor of every step; floor 0 is the plain cosine."""
    cases = []
    for steps, warmup, floor in ((20, 4, 0.0), (10, 0, 0.1), (7, 7, 0.5), (12, 3, 1.0)):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        sched = get_cosine_with_min_lr_schedule_with_warmup(opt, warmup, steps, min_lr_rate=floor)
        factors = []
        for _ in range(steps):
            factors.append(sched.get_last_lr()[0])
            opt.step()
            sched.step()
        cases.append(dict(steps=steps, warmup=warmup, floor=floor, factors=factors))
    return cases


def cross_entropy():
    """The sum over rows whose label is not -100, and its gradient."""
    logits = torch.randn(5, 7, requires_grad=True)
    labels = torch.tensor([3, -100, 0, 6, -100])
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    loss.backward()
    return dict(logits=flat(logits), shape=[5, 7], labels=labels.tolist(), sum=loss.item(), tokens=3, grad=flat(logits.grad))


out = dict(
    torch=torch.__version__.split("+")[0],
    adamw=adamw(),
    clip=clip(),
    schedule=schedule(),
    cross_entropy=cross_entropy(),
)
pathlib.Path(__file__).with_name("train.json").write_text(json.dumps(out, indent=1) + "\n")
