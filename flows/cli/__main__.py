"""``python -m flows.cli`` is the program, too."""

from flows.cli import main

main()
