"""Conversations rendered by transformers' `apply_chat_template`, in `templates/cases.json`.

    pip install -r requirements.txt && python make_templates.py

The templates beside the cases were written for this purpose, each in the style of a family: header tokens with a date,
thinking with function calls, alternating turns, marked generation, schemas by macros, documents, parts with images. Time
stands still at `NOW`. A case holds the `text`, or the message with which the template `refused`, or with which it `fails` on a conversation
that it was not written for.
"""

import datetime
import json
from pathlib import Path

import jinja2
from transformers.utils import chat_template_utils

from make_tokenizer import TEMPLATE

HERE = Path(__file__).resolve().parent / "templates"
NOW = datetime.datetime(2025, 3, 9, 14, 5, 7)
TOKENS = dict(bos_token="<s>", eos_token="</s>")


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def user(text):
    return dict(role="user", content=text)


def assistant(text, **more):
    return dict(role="assistant", content=text, **more)


def system(text):
    return dict(role="system", content=text)


def call(name, arguments, id=None):
    out = dict(type="function", function=dict(name=name, arguments=arguments))
    return dict(id=id, **out) if id else out


WEATHER = dict(
    type="function",
    function=dict(
        name="weather",
        description="Weather at a place.\nNow or later.",
        parameters=dict(
            type="object",
            properties=dict(
                place=dict(type="string", description="e.g. \"Zürich\" <CH>"),
                unit=dict(type="string", enum=["C", "F"], default="C"),
                days=dict(type=["integer", "null"], default=None),
                tags=dict(type="array", items=dict(type="string")),
            ),
            required=["place"],
        ),
    ),
)
SEARCH = dict(
    type="function",
    function=dict(
        name="搜索",
        description="网页搜索",
        parameters=dict(
            type="object",
            properties=dict(
                query=dict(type="string"),
                filter=dict(type="object", properties=dict(lang=dict(type="string"), max=dict(type="number", default=0.5))),
                any=dict(),
            ),
            required=["query"],
        ),
    ),
)
DOCUMENTS = [
    dict(title="Crabs", text="  Crabs walk sideways because their legs bend that way. 🦀  ", year=2021, tags=["sea", "legs"]),
    dict(title="", text="短文", checked=True),
    dict(text="Plain."),
]

CONVERSATIONS = {
    "hello": [user("Hi there")],
    "system": [system("You are terse."), user("Hi there")],
    "turns": [user("Hi"), assistant("Hello! 你好"), user("3+4=?\n next"), assistant("  7. "), user("the end?")],
    "answered": [system(" Answer in verse.\n"), user("Why?"), assistant("Because.")],
    "markup": [user("<b>\"a\" & 'b'</b> \\ {{ x }} {% if %}\t*"), assistant("<|end|>é🦀\u2028")],
    "spaces": [user("  \n lead: and trail \n\n"), assistant("\nx\n")],
    "empty": [user("")],
    "long": [user(f"question {i}") if i % 2 == 0 else assistant(f"answer: {i}.") for i in range(9)],
    "two users": [user("a"), user("b")],
    "stranger": [dict(role="critic", content="no")],
    "call": [
        user("Weather in Zürich?"),
        dict(role="assistant", tool_calls=[call("weather", dict(place="Zürich", days=2, unit="C"), "abcdefghi")]),
        dict(role="tool", content='{"t": 3.5, "sky": "grau"}', tool_call_id="abcdefghi", name="weather"),
        assistant("Grey, 3.5 °C."),
    ],
    "calls": [
        system("Use functions."),
        user("Both?"),
        assistant(
            None,
            tool_calls=[
                call("weather", dict(place="北京", tags=["a", "b"]), "000000001"),
                call("搜索", dict(query='"x" <y>', filter=dict(max=1e-05)), "000000002"),
            ],
        ),
        dict(role="tool", content="sunny", tool_call_id="000000001"),
        dict(role="tool", content="nothing", tool_call_id="000000002"),
    ],
    "call with text": [
        user("Go"),
        assistant("Let me look.", tool_calls=[call("weather", '{"place": "X"}', "short")]),
        dict(role="tool", content=dict(a=[1, 2.0, True, None]), tool_call_id="short"),
    ],
    "thought": [
        user("2+2?"),
        assistant("<think>\nTwo and two.\n</think>\n\n4"),
        user("And 3+3?"),
        assistant("6", reasoning_content="\nThree and three.\n"),
    ],
    "thought last": [user("2+2?"), assistant("<think>\nSum.\n</think>\n\n4", tool_calls=None)],
    "parts": [
        system([dict(type="text", text="See.")]),
        dict(
            role="user",
            content=[
                dict(type="image", image="a.png"),
                dict(type="text", text="What is this"),
                dict(type="image_url", image_url=dict(url="x")),
                dict(type="audio", seconds=1.5),
                dict(type="text", text="?"),
            ],
        ),
        assistant("A crab 🦀."),
        dict(role="user", content=[dict(type="image")]),
        assistant(None),
    ],
}

# template -> conversations, options
PLAN = {
    "megrez": [(c, {}) for c in ("hello", "system", "turns", "answered", "markup", "spaces", "empty", "long")]
    + [("turns", dict(add_generation_prompt=True)), ("call", {})],
    "headers": [(c, dict(add_generation_prompt=True)) for c in ("hello", "system", "turns", "markup", "spaces")]
    + [("answered", dict(extra=dict(today="1 Jan 2000")))]
    + [(c, dict(tools=[WEATHER, SEARCH], add_generation_prompt=True)) for c in ("hello", "system", "call", "calls")]
    + [("call with text", dict(extra=dict(functions=[SEARCH])))],
    "thinking": [(c, dict(add_generation_prompt=True)) for c in ("hello", "system", "turns", "thought", "call")]
    + [("hello", dict(add_generation_prompt=True, extra=dict(enable_thinking=False)))]
    + [(c, dict(tools=[WEATHER, SEARCH])) for c in ("call", "calls", "call with text", "system", "thought last")],
    "turns": [(c, {}) for c in ("hello", "system", "turns", "answered", "two users", "stranger", "call", "long")]
    + [(c, dict(tools=[WEATHER, SEARCH])) for c in ("call", "calls", "hello", "call with text")],
    "marked": [(c, dict(add_generation_prompt=g)) for c in ("turns", "markup", "answered") for g in (False, True)],
    "schema": [(c, dict(tools=[WEATHER, SEARCH])) for c in ("system", "call", "calls")]
    + [("turns", dict(add_generation_prompt=True)), ("markup", dict(tools=[]))],
    "documents": [(c, dict(documents=DOCUMENTS, add_generation_prompt=True)) for c in ("hello", "turns", "calls")]
    + [("answered", dict(extra=dict(citations=True))), ("empty", dict(documents=[]))],
    "parts": [(c, dict(add_generation_prompt=True)) for c in ("hello", "system", "parts", "long")]
    + [("parts", dict(extra=dict(numbered=True)))],
    "whitespace": [("turns", {}), ("spaces", {})],
    "crlf": [("turns", {})],
    "methods": [(c, {}) for c in ("turns", "markup", "spaces", "long", "parts", "two users")],
}


def render(source, messages, options):
    arguments = dict(
        conversations=[messages],
        chat_template=source,
        tools=options.get("tools"),
        documents=options.get("documents"),
        add_generation_prompt=options.get("add_generation_prompt", False),
        **{**TOKENS, **options.get("extra", {})},
    )
    try:
        return dict(text=chat_template_utils.render_jinja_template(**arguments)[0][0])
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError) as e:
        # Undefined values and type errors are failures of the template, not refusals.
        if type(e) is jinja2.exceptions.TemplateError:
            return dict(refused=str(e))
        return dict(fails=str(e))


def main():
    chat_template_utils.datetime = Frozen
    (HERE / "megrez.jinja").write_text(TEMPLATE, encoding="utf-8")
    cases = []
    for name, plan in PLAN.items():
        source = (HERE / f"{name}.jinja").read_bytes().decode("utf-8")
        for conversation, options in plan:
            messages = CONVERSATIONS[conversation]
            case = dict(template=name, conversation=conversation, **options, messages=messages)
            cases.append({**case, **render(source, messages, options)})
    head = dict(about="transformers 4.57.1, jinja2 3.1.6", now=NOW.isoformat(), tokens=TOKENS)
    lines = json.dumps(head)[:-1] + ',\n"cases": [\n'
    lines += ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases) + "\n]}\n"
    (HERE / "cases.json").write_text(lines, encoding="utf-8")
    for c in cases:
        if "text" not in c:
            print(c["template"], c["conversation"], c.get("refused"), c.get("fails"))
    print(f"{len(cases)} cases, {sum('text' in c for c in cases)} of them texts")


if __name__ == "__main__":
    main()
