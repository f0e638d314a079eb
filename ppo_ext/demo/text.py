"""Reading a user's text file."""

import shlex
from pathlib import Path


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without a byte order mark. Raises ValueError for what cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"demo: --corpus must be a readable file, got {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        has_mark = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise ValueError(
            f"demo: --corpus must be UTF-8 text, got {path} with byte 0x{error.object[error.start]:02x} "
            f"at position {error.start}; if it is Windows text, convert it with: "
            f"iconv -f {'UTF-16' if has_mark else 'WINDOWS-1252'} -t UTF-8 {shlex.quote(str(path))} > converted.txt"
        ) from error
