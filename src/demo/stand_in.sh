#!/bin/bash
# A stand-in for walferry with its command line and its JSON, made of PostgreSQL's own logical replication.
# The demo's tests run against it, so that they judge the demo and not the migration. It may be told to do HARM.
set -euo pipefail
HARM=no
PATH="@BIN@:$PATH"
command=$1
while [ $# -gt 1 ]; do
    shift
    case $1 in --source) source=$2 ;; --target) target=$2 ;; --dir) dir=$2 ;; esac
done
if [ "$command" = migrate ]; then
    mkdir "$dir"
    printf 'source=%q\ntarget=%q\n' "$source" "$target" >"$dir/servers"
elif [ ! -e "$dir/servers" ]; then
    echo "there is no migration in $dir" >&2
    exit 1
fi
. "$dir/servers"
on_source() { psql -XqAt -v ON_ERROR_STOP=1 -d "$source" -c "$1"; }
on_target() { psql -XqAt -v ON_ERROR_STOP=1 -d "$target" -c "$1"; }

case $command in
migrate)
    echo "$$ $dir $source $target" >"$(dirname "$0")/running"
    on_source "CREATE PUBLICATION stand_in FOR ALL TABLES"
    pg_dump --schema-only --no-publications "$source" | psql -Xq -v ON_ERROR_STOP=1 -d "$target" >"$dir/schema.log"
    on_target "CREATE SUBSCRIPTION stand_in CONNECTION '$source' PUBLICATION stand_in" >&2
    until [ -z "$(on_target "SELECT 1 FROM pg_subscription_rel WHERE srsubstate <> 'r'")" ]; do sleep 0.1; done
    touch "$dir/following"
    until [ -e "$dir/finished" ]; do sleep 0.1; done
    ;;
status)
    if [ -e "$dir/following" ]; then phase=following ready=true; else phase=copying ready=false; fi
    echo '{"version":1,"phase":"'$phase'","ready_to_cutover":'$ready',"blockers":[],"lag":{"bytes":100,"seconds":0.01},"copy":null}'
    ;;
cutover)
    begin=$(date +%s%3N)
    on_source "ALTER DATABASE shop SET default_transaction_read_only = on"
    application="FROM pg_stat_activity WHERE usename = 'shop_application' AND backend_start < '$(on_source "SELECT now()")'"
    on_source "SELECT pg_terminate_backend(pid) $application" >&2
    until [ -z "$(on_source "SELECT 1 $application")" ]; do sleep 0.01; done
    fence=$(on_source "SELECT pg_current_wal_insert_lsn()")
    until [ -n "$(on_source "SELECT 1 FROM pg_replication_slots WHERE slot_name = 'stand_in' AND confirmed_flush_lsn >= '$fence'")" ]; do
        sleep 0.01
    done
    on_target "DROP SUBSCRIPTION stand_in" >&2
    on_target "REFRESH MATERIALIZED VIEW shop.best_seller"
    PGOPTIONS="-c default_transaction_read_only=off" on_source "DROP PUBLICATION stand_in"
    on_source "SELECT format('SELECT setval(%L, %s, %L);', 'shop.' || quote_ident(sequencename), last_value, true)
               FROM pg_sequences WHERE last_value IS NOT NULL" >"$dir/sequences"
    psql -Xq -d "$target" -f "$dir/sequences" >&2
    if [ $HARM = yes ]; then
        on_target "SELECT setval('shop.invoice_number', last_value - 30) FROM shop.invoice_number" >&2
        on_target "DELETE FROM shop.ledger_entry WHERE number = (SELECT max(number) FROM shop.ledger_entry)"
        on_target "UPDATE shop.product SET version = version - 1 WHERE version > 0"
        on_target "UPDATE shop.archived_order SET total = total + 1 WHERE id = md5('archived 3')::uuid"
        on_target "DROP INDEX shop.open_order"
        on_target "CREATE PUBLICATION forgotten"
    fi
    ms=$(($(date +%s%3N) - begin))
    echo '{"version":1,"downtime_ms":'$ms',"cutover_lsn":"'"$fence"'","steps":[{"name":"everything","ms":'$ms'}],'
    echo '"sequences_synced":'"$(wc -l <"$dir/sequences")"',"verified":null,"reverse":{"armed":true}}'
    ;;
finish) touch "$dir/finished" ;;
clean) on_target "SELECT 1" >"$dir/../cleaned" ;;
esac
