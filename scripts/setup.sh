#!/bin/bash
# Installs what building and the demo need and what is missing, and nothing else; with the argument `tests` also what only the tests
# need. Run it as often as you like.
#
# Needs: Rust (https://rustup.rs). On Debian and Ubuntu the rest comes by apt-get; elsewhere it is looked for, and
# what is missing is named. No PostgreSQL cluster is made, started or touched: the tests and the demo make their own.
set -euo pipefail

MAJOR_MIN=15
for_tests=no
[ "${1:-}" = tests ] && for_tests=yes
# Where a program is unpacked that would come with a service of its own if it were installed.
TOOLS=$(cd "$(dirname "$0")/.." && pwd)/target/tools

main() {
    require_rust
    if have apt-get; then
        install_missing
        if [ "$for_tests" = yes ]; then
            unpack_prometheus
            unpack_docker
        fi
    fi
    check
}

require_rust() {
    if ! have cargo; then
        [ -r "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"
    fi
    have cargo || fail "cargo was not found. Install Rust first: https://rustup.rs"
}

# One line per need: how to see that it is met, and the packages of Debian that meet it.
install_missing() {
    local packages=()
    have cc || packages+=(gcc libc6-dev)
    have make || packages+=(make)
    have openssl || packages+=(openssl)
    have ps || packages+=(procps)
    [ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)
    [ -n "$(server_programs)" ] || packages+=(postgresql postgresql-contrib)
    [ -n "$(server_programs)" ] && ! have psql && ! [ -x "$(server_programs)/psql" ] && packages+=(postgresql-client)
    if [ "$for_tests" = yes ]; then
        have_pgbouncer || packages+=(pgbouncer)
        # The status page is looked at in a real browser.
        have chromium && have chromedriver || packages+=(chromium chromium-driver fonts-dejavu-core)
        # It reads the manual pages.
        have groff || packages+=(groff-base)
        # scripts/servers.sh gets servers of other versions by them.
        have npm || packages+=(npm)
        python3 -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
        # The trial with Docker Compose is run on an engine of the tests' own (unpack_docker); this package brings none.
        have docker-compose || packages+=(docker-compose)
        have ip || packages+=(iproute2)
        # Its types are moved as values and keys.
        compgen -G '/usr/share/postgresql/*/extension/postgis.control' >/dev/null || packages+=(postgresql-postgis)
    fi
    if [ ${#packages[@]} -eq 0 ]; then
        return 0
    fi
    echo "setup: installing ${packages[*]}"
    keep_the_package_from_making_a_cluster "${packages[@]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
    # The package begins a service of its own on port 6432; the tests start theirs.
    case " ${packages[*]} " in *" pgbouncer "*)
        if have systemctl && [ -d /run/systemd/system ]; then
            as_root systemctl disable --now pgbouncer >/dev/null 2>&1 || true
        fi
        ;;
    esac
}

# The dashboard and the alert rules are asked of a real one.
unpack_prometheus() {
    if have prometheus && have promtool || [ -x "$TOOLS/prometheus/usr/bin/promtool" ]; then
        return 0
    fi
    unpack prometheus prometheus || echo "setup: prometheus could not be had; the tests that need it will fail" >&2
}

# The trial in containers is run on an engine that the test starts and ends.
unpack_docker() {
    [ -x "$TOOLS/docker/usr/sbin/dockerd" ] || unpack docker docker.io containerd runc tini ||
        echo "setup: a Docker engine could not be had; the trial with Docker Compose will not be run, only its files be checked" >&2
}

# Unpacks packages below target/tools under a name: installed, they would start services.
unpack() {
    local name=$1 made package
    shift
    echo "setup: unpacking $* below target/tools"
    mkdir -p "$TOOLS"
    made=$(mktemp -d "$TOOLS/$name.XXXXXX")
    if (
        cd "$made"
        apt-get download -qq "$@" || { as_root apt-get update -qq && apt-get download -qq "$@"; } || exit 1
        for package in *.deb; do
            dpkg-deb -x "$package" unpacked || exit 1
        done
    ) >/dev/null 2>&1; then
        mv "$made/unpacked" "$TOOLS/$name"
        rm -rf "$made"
    else
        rm -rf "$made"
        return 1
    fi
}

have_pgbouncer() {
    have pgbouncer || [ -x /usr/sbin/pgbouncer ]
}

# Debian's server package makes and starts a cluster "main" on port 5432, unless it is told before not to. An
# existing configuration is somebody's: it stays as it is.
keep_the_package_from_making_a_cluster() {
    local configuration=/etc/postgresql-common/createcluster.conf
    case " $* " in *" postgresql "*) ;; *) return 0 ;; esac
    if [ ! -e "$configuration" ] && [ ! -e /etc/postgresql ]; then
        as_root mkdir -p "$(dirname "$configuration")"
        printf '# Written by the set-up of walferry: no cluster comes with the packages.\ncreate_main_cluster = false\n' |
            as_root tee "$configuration" >/dev/null
    fi
}

check() {
    local missing=() programs
    programs=$(server_programs)
    have cc || missing+=("a C compiler (cc)")
    have make || missing+=("make")
    have openssl || missing+=("openssl")
    if [ -z "$programs" ]; then
        missing+=("the programs of a PostgreSQL server, $MAJOR_MIN or newer (initdb, postgres; or set WALFERRY_PG_BIN to their directory)")
    else
        for program in pg_dump pg_restore psql; do
            [ -x "$programs/$program" ] || have "$program" || missing+=("$program")
        done
    fi
    if [ ${#missing[@]} -gt 0 ]; then
        printf 'setup: missing: %s\n' "${missing[@]}" >&2
        exit 1
    fi
    if [ "$for_tests" = yes ]; then
        have_pgbouncer || echo "setup: PgBouncer was not found; the tests that need it will fail" >&2
    fi
    echo "setup: PostgreSQL $(major "$programs") in $programs, $(cargo --version)"
}

# The directory of the newest server programs, as the demo looks for them; nothing when there are none.
server_programs() {
    local directory best="" best_major=$((MAJOR_MIN - 1)) postgres
    for directory in ${WALFERRY_PG_BIN:-$(dirname "$(command -v postgres || echo /nowhere/postgres)") /usr/lib/postgresql/*/bin /usr/pgsql-*/bin}; do
        postgres=$(readlink -f "$directory/postgres" 2>/dev/null) || continue
        directory=$(dirname "$postgres")
        if [ -x "$postgres" ] && [ -x "$directory/initdb" ] && [ "$(major "$directory")" -gt "$best_major" ]; then
            best=$directory best_major=$(major "$directory")
        fi
    done
    echo "$best"
}

major() {
    "$1/postgres" --version | sed -n 's/.*(PostgreSQL) \([0-9]*\).*/\1/p'
}

have() {
    command -v "$1" >/dev/null 2>&1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        # Never asks: a set-up that waits for a password hangs where nobody looks.
        sudo -n "$@" || fail "sudo wants a password. Run this once: sudo -v, and then the set-up again"
    else
        fail "packages are missing and this is not root, and there is no sudo. Run as root: scripts/setup.sh"
    fi
}

fail() {
    echo "setup: $1" >&2
    exit 1
}

main
