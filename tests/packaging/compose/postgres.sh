#!/bin/bash
# Stands in for the entry point of the postgres image: makes the server with its password and database, runs what is in
# /docker-entrypoint-initdb.d on a server that only the socket reaches, and becomes the server. Nothing more of it is used in the trial.
set -euo pipefail
programs=$(echo /usr/lib/postgresql/*/bin)
export PATH=$programs:$PATH PGDATA=/var/lib/postgresql/data
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown postgres:postgres "$PGDATA"
    exec setpriv --reuid postgres --regid postgres --clear-groups "${BASH_SOURCE[0]}" "$@"
fi
if [ ! -e "$PGDATA/PG_VERSION" ]; then
    initdb -N --username postgres --pwfile "$POSTGRES_PASSWORD_FILE" --auth-local trust --auth-host scram-sha-256 >/dev/null
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    settings="-c listen_addresses= -c unix_socket_directories=/tmp"
    pg_ctl -s -w -o "$settings" start
    export PGHOST=/tmp
    createdb -U postgres "$POSTGRES_DB"
    for script in /docker-entrypoint-initdb.d/*.sh; do
        "$script"
    done
    unset PGHOST
    pg_ctl -s -w -m fast stop
fi
exec "$@" -c listen_addresses="$TRIAL_LISTEN" -c unix_socket_directories=/tmp -c fsync=off
