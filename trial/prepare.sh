#!/bin/bash
# Makes the passwords of the trial, once, and hands each service those that it needs.
set -euo pipefail
umask 077
cd /made
[ ! -e primary/host ] || exit 0

random() {
    head -c 24 /dev/urandom | base64 | tr '+/' 'xy'
}

random > source/password
random > target/password
# The application's, which both servers have.
random | tee source/application target/application > /dev/null
for server in source target; do
    echo "$server:5432:*:postgres:$(cat $server/password)" >> walferry/pgpass
    echo "$server:5432:*:app:$(cat $server/application)" >> load/pgpass
done
echo source > primary/host
# The user of walferry's image.
chown -R 10001:10001 walferry primary
chown -R postgres:postgres source target load
chmod 0755 primary
chmod 0644 primary/host
