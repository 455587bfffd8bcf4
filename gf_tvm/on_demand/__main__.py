"""``python -m gf_tvm.on_demand``: the process that :func:`.builder.run` starts."""

import sys

from .builder import main

if __name__ == "__main__":
    sys.exit(main())
