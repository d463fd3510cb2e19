"""sparserve: serve Llama-family models, reading only the neurons that a prompt needs."""

import os
from importlib.metadata import version

__version__ = version("sparserve")

# torch's OpenMP threads spin at every barrier, by default for milliseconds. Wherever a core is shared
# (the event loop, a neighbour, a client on the same machine) the one that is not running then holds
# up all: measured 2.2 instead of 18 tokens/s beside one busy process on two cores. Read when torch
# is first loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
