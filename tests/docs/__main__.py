"""python -m tests.docs: writes what is out of date, and says what it wrote."""

from pathlib import Path

from tests.docs import MADE

ROOT = Path(__file__).parents[2]

for name, make in MADE.items():
    path, text = ROOT / name, make()
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(name)
