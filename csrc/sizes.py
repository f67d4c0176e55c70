"""`python csrc/sizes.py dist`: how large the newest wheel there is, and what is compiled in it."""

import sys
import zipfile
from pathlib import Path


def sizes(wheel: Path) -> str:
    """A line for the wheel, and one for each compiled file in it: its size, and packed."""
    with zipfile.ZipFile(wheel) as files:
        compiled = [file for file in files.infolist() if ".so" in Path(file.filename).name]
    lines = [f"{wheel}: {wheel.stat().st_size / 1e6:.2f} MB"]
    for file in compiled:
        lines.append(f"  {file.filename}: {file.file_size / 1e6:.2f} MB, packed {file.compress_size / 1e6:.2f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    print(sizes(wheels[-1]) if wheels else f"there is no wheel in {sys.argv[1]}")
