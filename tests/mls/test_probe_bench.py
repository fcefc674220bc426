"""`mls bench probe` on small data: its two sides solve the same problem. How long they take decides nothing here."""

import subprocess
from collections.abc import Callable

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_benchmark_prints_a_table_in_which_both_sides_agree(mls_command: Command) -> None:
    done = mls_command("bench", "probe", "--quick")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    header, values = rows[0], {row[0]: row for row in rows[2:]}
    assert len(values) == 12 and all(len(row) == len(header) for row in values.values())
    for name, row in values.items():
        apart = float(row[header.index("apart")])
        # Three hundred images are tested, or sixty: one may tip over.
        assert apart <= (1.7 if "300 images" in name else 1.01 if "top-1" in name else 0.5)
