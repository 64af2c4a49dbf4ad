"""transformers as a peer of the suites `decode` and `prefill`.

    python decode_peer.py CHECKPOINT float32|bfloat16 THREADS

Reads commands from stdin and answers each on stdout, one line of JSON each way:

    {"do": "begin", "batch": 4, "past": "file.safetensors" or null}  ->  {}
    {"do": "call", "ids": [..batch x rows..]}                        ->  {"seconds": 0.1}
    {"do": "logits", "file": "out.f32"}                              ->  {}

What goes wrong is answered as {"error": ".."}. Ends with its input.
"""

import json
import os
import sys
import time
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # What libraries print must not stand among the answers.


def answer(**fields):
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


class Peer:
    def __init__(self, folder, dtype, threads):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def begin(self, batch, past):
        from transformers import DynamicCache

        self.batch, self.cache = batch, DynamicCache()
        if past is not None:
            from safetensors.torch import load_file

            kept = load_file(past)
            for layer in range(self.model.config.num_hidden_layers):
                # [kv_heads, rows, head_dim] -> [batch, kv_heads, rows, head_dim]
                k, v = (kept[f"{layer}.{name}"].expand(batch, -1, -1, -1).contiguous() for name in "kv")
                self.cache.update(k, v, layer)
        return {}

    def call(self, ids):
        torch = self.torch
        with torch.inference_mode():
            start = time.perf_counter()
            ids = torch.tensor(ids).view(self.batch, -1)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
        self.last = out.logits
        return {"seconds": seconds}

    def logits(self, file):
        self.last.float().contiguous().numpy().tofile(file)
        return {}


def main():
    folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    try:
        peer = Peer(folder, dtype, threads)
    except Exception as error:
        traceback.print_exc()
        return answer(error=f"{type(error).__name__}: {error}")
    answer(**peer.versions)
    for line in sys.stdin:
        try:
            command = json.loads(line)
            answer(**getattr(peer, command.pop("do"))(**command))
        except Exception as error:
            traceback.print_exc()
            answer(error=f"{type(error).__name__}: {error}")


main()
