"""Makes dsdt_aml.py from dsdt.asl with `iasl` (Debian: acpica-tools):  python -m domains.dom0.builder.firmware.compile_dsdt"""

from __future__ import annotations

import base64
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def compile_dsdt() -> bytes:
    """The table that `iasl` makes; the compiler's identity and version in its header are blanked. CalledProcessError, OSError."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["iasl", "-p", f"{folder}/dsdt", str(HERE / "dsdt.asl")]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        table = bytearray(Path(folder, "dsdt.aml").read_bytes())
    table[28:36] = b"HVML\0\0\0\0"
    table[9] = 0
    table[9] = -sum(table) & 0xFF
    return bytes(table)


def main() -> None:
    """Write the module."""
    text = base64.b64encode(compile_dsdt()).decode()
    lines = "\n".join(f'    b"{text[at : at + 100]}"' for at in range(0, len(text), 100))
    (HERE / "dsdt_aml.py").write_text(
        '"""The compiled DSDT. Made by compile_dsdt.py from dsdt.asl; a test compares them."""\n\n'
        "import base64\nfrom typing import Final\n\n"
        f"DSDT: Final = base64.b64decode(\n{lines}\n)\n"
    )


if __name__ == "__main__":
    main()
