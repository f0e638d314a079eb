"""`python -m bench`: a selection in a few minutes; `python -m bench --full`: everything."""

from .command import main

main()
