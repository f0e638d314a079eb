"""The long checks of where the package builds and runs: the oldest and the newest torch, other compilers, aarch64.

`python -m tests.platforms --help` lists them; `make torch-versions` runs all and keeps the table.
"""
