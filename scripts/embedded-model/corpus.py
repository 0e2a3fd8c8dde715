#!/usr/bin/env python3
"""Writes the King James Bible as plain text: a verse a line, an empty line after each chapter, no references.

    apt-get install bible-kjv
    python3 scripts/embedded-model/corpus.py kjv.txt

The text is Debian's `bible-kjv-text` (the translation of 1611, out of copyright), printed by the program `bible`.
"""

import re
import subprocess
import sys


def main():
    printed = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], check=True, capture_output=True, text=True
    ).stdout
    chapters = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"(\S+?)(\d+):(\d+) (.*)", line)
        if not match:
            sys.exit(f"not a verse: {line!r}")
        book, chapter, _, verse = match.groups()
        chapters.setdefault((book, int(chapter)), []).append(verse.strip())
    if len(chapters) != 1189:
        sys.exit(f"{len(chapters)} chapters instead of 1189")
    with open(sys.argv[1], "w", encoding="ascii") as file:
        file.write("\n\n".join("\n".join(verses) for verses in chapters.values()))


if __name__ == "__main__":
    main()
