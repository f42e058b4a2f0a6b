"""`python -m feedfast` is the `feedfast` command, for machines where scripts are not on the path."""

from feedfast.cli import main

main()
