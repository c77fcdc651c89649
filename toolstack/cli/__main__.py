"""`python -m toolstack.cli` is `domicile`."""

from toolstack.cli import main

main()
