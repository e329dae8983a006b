#!/bin/bash
# The application: fifty small transactions a second on whichever server is the primary. A cutover ends its sessions, as it does with every
# application; it connects again, and looks where to, until it is let in.
set -uo pipefail
while true; do
    host=$(cat /primary/host)
    echo "load: writing to $host"
    # LOAD is a list of options.
    # shellcheck disable=SC2086
    pgbench ${LOAD:-} --no-vacuum --client 4 --rate 50 --time 86400 --progress 30 --host "$host" --username app shop
    sleep 0.5
done
