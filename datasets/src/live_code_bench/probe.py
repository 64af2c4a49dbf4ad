"""Tries what a program must not be able to do, and prints what it could."""

import os
import socket
import threading

ATTEMPTS = {
    "write a file": lambda: open("written", "w"),
    "delete a file": lambda: os.unlink("program.py"),
    "open a socket": socket.socket,
    "start a process": lambda: os.fork() or os._exit(0),
    "signal a process": lambda: os.kill(os.getppid(), 0),
}

for name, attempt in ATTEMPTS.items():
    try:
        attempt()
    except OSError:
        continue
    print(name)

thread = threading.Thread(target=print, args=("done",))
thread.start()
thread.join()
