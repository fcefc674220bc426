"""The pictures of docs/reading-a-report.md: parts of a page of `mls report`, as Chromium shows them.

python docs/pictures.py ONE.html TWO.html        # pages of one run and of two
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# File -> which page, which section of it, its width and height in pixels.
PICTURES = {
    "report_verdict.png": (0, "verdict", 1000, 460),
    "report_curves.png": (1, "curves", 1000, 490),
    "report_gallery.png": (0, "gallery", 1000, 560),
    "report_labels.png": (0, "labels", 1000, 905),
}


def picture(page: Path, section: str, width: int, height: int, out: Path) -> None:
    """The other sections are hidden, since Chromium takes its picture at the top of a page."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    hide = f"<style>section:not(#{section}), nav, h1 {{ display: none }} h2 {{ margin-top: 0 }}</style></head>"
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.html"
        part.write_text(text.replace("</head>", hide, 1), encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={width},{height}", "--virtual-time-budget=5000", f"--screenshot={out.absolute()}"]
        subprocess.run([*command, part.as_uri()], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    for name, (page, section, width, height) in PICTURES.items():
        picture(Path(sys.argv[1 + page]), section, width, height, Path(__file__).parent / name)
