"""The official OpenAI client against a running `megrez serve`.

    python openai_client.py URL KEY

Every check prints a line; the first that fails ends the script with code 1. Needs the package `openai`.
"""

import sys

import openai

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def check(what, holds, found=None):
    if not holds:
        sys.exit(f"FAILED {what}: {found!r}")
    print(f"ok {what}")


def raises(what, kind, call, words=""):
    try:
        call()
    except kind as error:
        check(what, words in str(error), str(error))
    else:
        sys.exit(f"FAILED {what}: nothing was raised")


def main(url, key):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=120, max_retries=0)
    models = [m.id for m in client.models.list()]
    check("one model", len(models) == 1, models)
    model = models[0]
    check("the model by name", client.models.retrieve(model).id == model)
    chat = client.chat.completions

    whole = chat.create(model=model, messages=MESSAGES, temperature=0)
    text = whole.choices[0].message.content
    check("a reply", "#### 7" in text and whole.choices[0].finish_reason == "stop", text)
    check("usage", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens)

    # The client reads up to [DONE]: a stream without it would end in an error or not at all.
    chunks = list(chat.create(model=model, messages=MESSAGES, temperature=0, stream=True))
    joined = "".join(c.choices[0].delta.content or "" for c in chunks)
    check("a stream is the reply in pieces", joined == text, joined)
    check("no usage unless asked for", all(c.usage is None for c in chunks))
    check("one id", len({c.id for c in chunks}) == 1)
    check("the reason stands in the last chunk", [c.choices[0].finish_reason for c in chunks][-1] == "stop")
    options = {"include_usage": True}
    chunks = list(chat.create(model=model, messages=MESSAGES, temperature=0, stream=True, stream_options=options))
    check("usage in a chunk without choices", chunks[-1].choices == [] and chunks[-1].usage is not None)
    check("the same usage", chunks[-1].usage.completion_tokens == whole.usage.completion_tokens)
    with chat.with_streaming_response.create(model=model, messages=MESSAGES, stream=True) as raw:
        lines = [line for line in raw.iter_lines() if line]
    check("[DONE] ends a stream", lines[-1] == "data: [DONE]", lines[-1])

    several = chat.create(model=model, messages=MESSAGES, temperature=1, n=3, seed=5, max_tokens=20)
    again = chat.create(model=model, messages=MESSAGES, temperature=1, n=3, seed=5, max_tokens=20)
    check("n choices", [c.index for c in several.choices] == [0, 1, 2])
    replies = [c.message.content for c in several.choices]
    check("a seed repeats them", replies == [c.message.content for c in again.choices], replies)
    spoken = chat.create(model=model, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=2)
    tokens = spoken.choices[0].logprobs.content
    check("log-probabilities", all(t.logprob <= 0 and len(t.top_logprobs) == 2 for t in tokens))
    stopped = chat.create(model=model, messages=MESSAGES, temperature=0, stop=["####"])
    check("a stop string", stopped.choices[0].message.content == text.split("####")[0])

    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = MESSAGES + [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    reply = chat.create(model=model, messages=talk, tools=TOOLS, max_tokens=8)
    check("tools and a result", reply.usage.prompt_tokens > whole.usage.prompt_tokens)

    for prompt in ["Hi", [40, 41, 42]]:
        reply = client.completions.create(model=model, prompt=prompt, max_tokens=4, extra_body={"ignore_eos": True})
        check(f"text after {prompt!r}", reply.usage.completion_tokens == 4)
    pieces = client.completions.create(model=model, prompt="Hi", max_tokens=4, stream=True)
    check("text in pieces", len(list(pieces)) >= 1)

    for wait in [0, 3]:
        stream = chat.create(
            model=model, messages=MESSAGES, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        for _ in zip(range(wait), stream):
            pass
        stream.close()
        after = chat.create(model=model, messages=MESSAGES, temperature=0)
        check(f"cancelled after {wait} chunks, the next is answered", after.choices[0].message.content == text)

    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    raises("a wrong key", openai.AuthenticationError, lambda: wrong.models.list())
    raises("an unknown model", openai.NotFoundError, lambda: chat.create(model="gpt-7", messages=MESSAGES), "gpt-7")
    for field, value in [("temperature", 999999), ("top_p", -1), ("n", 10**6), ("max_tokens", 2**31)]:
        bad = {"model": model, "messages": MESSAGES, field: value}
        raises(f"{field} {value}", openai.BadRequestError, lambda bad=bad: chat.create(**bad), field)
    raises("no messages", openai.BadRequestError, lambda: chat.create(model=model, messages=[]), "messages")
    after = chat.create(model=model, messages=MESSAGES, temperature=0)
    check("after errors the next is answered", after.choices[0].message.content == text)


if __name__ == "__main__":
    main(*sys.argv[1:])
