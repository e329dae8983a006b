#!/bin/bash
# Makes the pictures in docs/pictures again: one migration between throwaway servers, its page in a headless Chromium and its terminal on a pseudo
# terminal, in each phase. Takes some minutes, needs chromium, chromedriver, script (util-linux), the font DejaVu Sans Mono, python3, and the
# ports 127.0.0.2:5432, 127.0.0.3:5432 and 127.0.0.1:9617. Look at each before you commit it.
set -euo pipefail
cd "$(dirname "$0")/.."

made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
SCREENSHOTS=$made cargo test --test terminal -- --ignored --exact pictures::of_every_phase --nocapture
mkdir -p docs/pictures
for picture in "$made"/*.png; do
    python3 scripts/smaller_png.py "$picture" "docs/pictures/$(basename "$picture")"
done
du -ch docs/pictures/*.png | tail -n 1
