#!/bin/bash
# The new server's database: empty, with the application's role. The image runs it when it makes the server.
set -euo pipefail
psql -q -v ON_ERROR_STOP=1 -U postgres -d shop <<'SQL'
\set password `cat /run/trial/application`
CREATE ROLE app LOGIN PASSWORD :'password';
ALTER DATABASE shop OWNER TO app;
SQL
