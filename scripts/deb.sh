#!/bin/bash
# Builds the package for Debian and Ubuntu in target/debian, or where --output among the given options of cargo-deb says. What is in it stands
# in Cargo.toml. WALFERRY_PROGRAM stands in for a release build that is to be made.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo deb --version >/dev/null 2>&1 || { echo "deb: cargo-deb is missing. Install it: cargo install --locked cargo-deb" >&2 && exit 1; }
target=${CARGO_TARGET_DIR:-target}
if [ -n "${WALFERRY_PROGRAM:-}" ]; then
    mkdir -p "$target/release"
    strip -o "$target/release/walferry" "$WALFERRY_PROGRAM"
else
    cargo build --release --locked --bin walferry
fi

# Where Cargo.toml looks for them.
made=target/packaging
rm -rf "$made"
mkdir -p "$made/man" "$made/completions"
"$target/release/walferry" man --out "$made/man"
"$target/release/walferry" completions bash >"$made/completions/walferry"
"$target/release/walferry" completions zsh >"$made/completions/_walferry"
"$target/release/walferry" completions fish >"$made/completions/walferry.fish"
cargo deb --locked --no-build "$@"
