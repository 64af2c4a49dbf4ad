"""Says what this interpreter is: its own path, its version, and where it has its libraries from."""

import os
import platform
import sys

print(sys.executable)
print(platform.python_version())
places = {sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sys.path}
# What is read at every start may lie elsewhere, behind a link.
places |= {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
for place in sorted({os.path.realpath(place) for place in places if place}):
    print(place)
