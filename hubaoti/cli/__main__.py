"""`python -m hubaoti.cli` is `hubaoti`."""

from hubaoti.cli import main

main()
