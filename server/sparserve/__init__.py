"""sparserve: serve Llama-family models, reading only the neurons that a prompt needs."""

from importlib.metadata import version

__version__ = version("sparserve")
