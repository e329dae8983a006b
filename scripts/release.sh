#!/bin/bash
# Builds the program for other machines: target/release/walferry, with a copy for the version and machine and its checksum in target/dist.
#
# It is not wholly static: the C library stays a shared one (names and certificates are looked up by it), everything else is inside. So it runs
# on every Linux whose glibc is not older than the one it was built with; the script says which that is. Build on the oldest that it is for.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --release --locked --bin walferry
program=target/release/walferry

# What it may be linked with, and nothing else: the parts of glibc, and the unwinder of gcc.
allowed='^(linux-vdso|ld-linux[-a-z0-9_]*|libc|libm|libgcc_s|libpthread|libdl|librt)\.so'
others=$(ldd "$program" | sed 's/^[[:space:]]*//; s/^\/.*\///; s/ .*//' | grep -Ev "$allowed" || true)
if [ -n "$others" ]; then
    echo "release: linked with what other machines may not have: $others" >&2
    exit 1
fi
glibc=$(objdump -T "$program" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)

version=$("$program" --version)
name=walferry-$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)-$(uname -m)-linux-gnu
mkdir -p target/dist
strip -o "target/dist/$name" "$program"
(cd target/dist && sha256sum "$name" >"$name.sha256")
echo "release: $version, needs ${glibc/_/ } or newer: target/dist/$name"
