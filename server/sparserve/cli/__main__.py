"""`python -m sparserve.cli`, for commands that start others with the interpreter they run in."""

from sparserve.cli import main

main()
