"""What auditwheel says of a wheel: on which Linux it runs, and which of the system's libraries it needs."""

import re
import sys
from pathlib import Path

from .packages import run

GLIBC = (2, 28)


def check_wheel(wheel):
    """One row. auditwheel names the oldest Linux on which the wheel runs; a newer one than GLIBC's is a failure."""
    printed = run([Path(sys.executable).with_name("auditwheel"), "show", wheel])
    return row_of(wheel.name, " ".join(printed.split()))


def row_of(name, printed):
    tag = re.search(r'is consistent with the following platform tag: "(\w+)"', printed)[1]
    promised = re.match(r"manylinux_(\d+)_(\d+)_", tag)
    fits = promised is not None and tuple(map(int, promised.groups())) <= GLIBC
    return {
        "wheel": name,
        "platform tag": tag,
        "libraries": ", ".join(sorted(set(re.findall(r"(\S+\.so\S*) with versions", printed)))),
        "failures": [] if fits else [f"needs more than manylinux_{GLIBC[0]}_{GLIBC[1]} has"],
    }
