-- Large objects of every kind: the OIDs are named, because applications keep them in columns.
CREATE TABLE document (id integer PRIMARY KEY, content oid);
SELECT lo_from_bytea(100, 'short');
SELECT lo_from_bytea(101, '');
-- Exactly one chunk, one byte more, and several chunks that no compression makes small.
SELECT lo_from_bytea(102, decode(repeat('ab', 1048576), 'hex'));
SELECT lo_from_bytea(103, decode(repeat('cd', 1048577), 'hex'));
SELECT lo_from_bytea(104, (SELECT string_agg(decode(md5(n::text), 'hex'), '' ORDER BY n) FROM generate_series(1, 200000) n));
-- A hole at the beginning, in the middle, and at the end.
SELECT lo_create(105);
SELECT lo_put(105, 5000000, 'behind a hole');
SELECT lo_from_bytea(106, 'lo');
SELECT lo_put(106, 9437184, 'far behind');
SELECT lo_from_bytea(107, 'x');
SELECT lo_truncate64(lo_open(107, 131072), 2097152);
-- Nothing but a hole.
SELECT lo_create(108);
SELECT lo_truncate64(lo_open(108, 131072), 3145728);
-- Owners, privileges, comments.
ALTER LARGE OBJECT 100 OWNER TO lo_owner;
GRANT SELECT ON LARGE OBJECT 100 TO PUBLIC;
GRANT SELECT, UPDATE ON LARGE OBJECT 102 TO "Lo Reader" WITH GRANT OPTION;
REVOKE UPDATE ON LARGE OBJECT 103 FROM CURRENT_USER;
COMMENT ON LARGE OBJECT 103 IS 'it''s large';
SELECT lo_from_bytea(109, 'nine'), lo_from_bytea(110, 'ten');
-- More than are compared at once.
SELECT count(lo_from_bytea((1000 + n)::oid, n::text::bytea)) FROM generate_series(1, 600) n;
INSERT INTO document SELECT oid::text::integer, oid FROM pg_largeobject_metadata;
