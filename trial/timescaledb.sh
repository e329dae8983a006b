#!/bin/bash
# A hypertable with chunks of an hour, for docker-compose.timescaledb.yml.
set -euo pipefail
psql -q -v ON_ERROR_STOP=1 -U postgres -d shop -c 'CREATE EXTENSION IF NOT EXISTS timescaledb'
psql -q -v ON_ERROR_STOP=1 -U app -d shop <<'SQL'
CREATE TABLE measurement (at timestamptz NOT NULL, device int NOT NULL, value double precision, PRIMARY KEY (device, at));
SELECT create_hypertable('measurement', 'at', chunk_time_interval => interval '1 hour');
INSERT INTO measurement
SELECT at, device, random() FROM generate_series(now() - interval '3 days', now(), interval '10 seconds') AS at, generate_series(1, 10) AS device;
SQL
