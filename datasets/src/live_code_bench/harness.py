"""Runs program.py on one test: with a function's name, calls it with the arguments on standard input; else as it is."""

import json
import os
import random
import sys

# What programs of this benchmark may use without importing it, and in which order one name hides another.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
).split()


def load(name):
    """The program, compiled, and the namespace that it runs in."""
    with open("program.py", encoding="utf-8") as file:
        code = compile(file.read(), "program.py", "exec")
    space = {"__name__": name}
    for module in MODULES:
        exec(f"from {module} import *", space)
    for module in MODULES:
        exec(f"import {module}", space)
    random.seed(0)
    sys.setrecursionlimit(50_000)
    return code, space


def call(name):
    """Calls a function, or a method of Solution, and writes what it returns as JSON."""
    arguments = [json.loads(line) for line in sys.stdin.read().split("\n") if line.strip()]
    # Standard output carries the value and nothing else; what the program prints goes the way of its errors.
    answer = os.dup(1)
    os.dup2(2, 1)
    code, space = load("program")
    exec(code, space)
    owner = space.get("Solution")
    function = space[name] if owner is None else getattr(owner(), name)
    # Numbers of numpy know their value by this name.
    text = json.dumps(function(*arguments), default=lambda value: value.item())
    with os.fdopen(answer, "w") as file:
        file.write(text)


def main(names):
    if names:
        return call(*names)
    code, space = load("__main__")
    try:
        exec(code, space)
    except SystemExit:
        # However it says goodbye, its output counts.
        sys.stdout.flush()


main(sys.argv[1:])
