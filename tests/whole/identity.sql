-- Every replica identity, with every kind of key beside it.
CREATE SCHEMA identity;
CREATE TABLE identity.default_key (id integer PRIMARY KEY, other integer UNIQUE, t text);
CREATE TABLE identity.default_wide_key (b text, a integer, t text, PRIMARY KEY (a, b));
CREATE TABLE identity.by_index (id integer PRIMARY KEY, code text NOT NULL, t text);
CREATE UNIQUE INDEX by_index_code ON identity.by_index (code) INCLUDE (t);
ALTER TABLE identity.by_index REPLICA IDENTITY USING INDEX by_index_code;
CREATE TABLE identity.by_index_alone (code text NOT NULL UNIQUE, t text);
ALTER TABLE identity.by_index_alone REPLICA IDENTITY USING INDEX by_index_alone_code_key;
CREATE TABLE identity.full_key (id integer PRIMARY KEY, t text);
ALTER TABLE identity.full_key REPLICA IDENTITY FULL;
CREATE TABLE identity.full_unique (code text NOT NULL UNIQUE, t text);
ALTER TABLE identity.full_unique REPLICA IDENTITY FULL;
CREATE TABLE identity.full_nullable (code text UNIQUE, t text);
ALTER TABLE identity.full_nullable REPLICA IDENTITY FULL;
-- No equality for any of them, and rows that are equal.
CREATE TABLE identity.full_json (j json, p point, x xml, n integer);
ALTER TABLE identity.full_json REPLICA IDENTITY FULL;
-- Values that are equal and not the same: only the same one may change.
CREATE TABLE identity.full_alike (n numeric, f float8, c char(5), i interval, t text COLLATE "C");
ALTER TABLE identity.full_alike REPLICA IDENTITY FULL;
-- The stream tells nothing but their inserts.
CREATE TABLE identity.nothing_key (id integer PRIMARY KEY, t text);
ALTER TABLE identity.nothing_key REPLICA IDENTITY NOTHING;
CREATE TABLE identity.default_none (n integer, t text);
CREATE TABLE identity.nullable_unique (n integer UNIQUE, t text);
CREATE TABLE identity.deferrable_key (id integer PRIMARY KEY DEFERRABLE, t text);

INSERT INTO identity.default_key SELECT i, i * 2, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.default_wide_key SELECT 'b' || i % 3, i, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.by_index SELECT i, 'c' || i, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.by_index_alone SELECT 'c' || i, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.full_key SELECT i, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.full_unique SELECT 'c' || i, 't' FROM generate_series(1, 50) i;
INSERT INTO identity.full_nullable SELECT 'c' || nullif(i % 30, i), 't' FROM generate_series(1, 50) i;
INSERT INTO identity.full_json SELECT '{"a": 1}', '(1,2)', '<a/>', i % 3 FROM generate_series(1, 12) i;
INSERT INTO identity.full_json SELECT '{"a":1}', '(1,2)', '<a />', NULL FROM generate_series(1, 3) i;
INSERT INTO identity.full_alike SELECT 1.0, 0, 'a', interval '1 day', NULL FROM generate_series(1, 3) UNION ALL SELECT 1.00, '-0', 'a', interval '24:00', '' FROM generate_series(1, 3);
INSERT INTO identity.nothing_key SELECT i, 't' FROM generate_series(1, 20) i;
INSERT INTO identity.default_none SELECT i, 't' FROM generate_series(1, 20) i;
INSERT INTO identity.nullable_unique SELECT nullif(i, 3), 't' FROM generate_series(1, 20) i;
INSERT INTO identity.deferrable_key SELECT i, 't' FROM generate_series(1, 20) i;
