"""`python -m fomoe.cli` is the command `fomoe`."""

from fomoe.cli.main import main

main()
