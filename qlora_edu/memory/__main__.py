"""`python -m qlora_edu.memory package.module:function '[arguments]'`: call it and print its result, a line of JSON.

The other end of `measured.in_fresh_process`.
"""

import importlib
import json
import sys

if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))))
