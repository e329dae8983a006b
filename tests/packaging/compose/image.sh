#!/bin/bash
# Writes the file system of a small Debian with PostgreSQL to standard output, as tar, for `docker import`: the files of packages that are
# installed on this machine, so nothing is downloaded. Given files are added in /usr/bin.
set -euo pipefail

# What the trial runs, and what that needs.
server=$(dpkg-query -W -f '${Package} ${db:Status-Abbrev}\n' 'postgresql-[0-9]*' | sed -n 's/^\(postgresql-[0-9]*\) ii.*/\1/p' | sort -V | tail -n 1)
[ -n "$server" ] || { echo "no package of a PostgreSQL server is installed" >&2 && exit 1; }
wanted=(bash coreutils findutils grep sed libc-bin util-linux "$server" "postgresql-client-${server#postgresql-}")
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT

apt-cache depends --recurse --installed --no-suggests --no-recommends --no-conflicts --no-breaks --no-replaces --no-enhances "${wanted[@]}" |
    grep -E '^[a-z0-9]' | sort -u >"$files/packages"
# The compiler for queries is large, and not needed.
while read -r package; do
    case $package in libllvm* | libz3-* | perl* | systemd* | dpkg* | apt*) continue ;; esac
    dpkg-query -L "$package" 2>/dev/null || true
done <"$files/packages" | sort -u >"$files/all"
while read -r name; do
    case $name in
    /bin | /sbin | /lib | /lib32 | /lib64 | /libx32) ;;
    /lib/systemd/* | */security/pam_* | /usr/share/doc/* | /usr/share/man/* | /usr/share/locale/* | /usr/share/i18n/* | /usr/lib/postgresql/*/lib/bitcode/* | */llvmjit*) ;;
    *) if [ -f "$name" ] || [ -L "$name" ]; then echo "${name#/}"; fi ;;
    esac
done <"$files/all" >"$files/names"

root="$files/root"
mkdir -p "$root"/{etc,tmp,run,proc,sys,dev,usr/bin,usr/sbin,usr/lib,usr/lib64,var/lib/postgresql}
chmod 1777 "$root/tmp"
for directory in bin sbin lib lib64; do
    ln -s "usr/$directory" "$root/$directory"
done
tar -C / --hard-dereference --no-recursion -cf - -T "$files/names" | tar -C "$root" --keep-directory-symlink -xf -
printf 'root:x:0:0::/root:/bin/bash\npostgres:x:999:999::/var/lib/postgresql:/bin/bash\n' >"$root/etc/passwd"
printf 'root:x:0:\npostgres:x:999:\n' >"$root/etc/group"
ln -sf bash "$root/bin/sh"
# Debian's are wrappers that find a cluster.
for program in "$root"/usr/lib/postgresql/*/bin/*; do
    ln -sf "${program#"$root"}" "$root/usr/bin/"
done
for program in "$@"; do
    cp "$program" "$root/usr/bin/"
done
tar -C "$root" --numeric-owner --owner 0 --group 0 -cf - .
