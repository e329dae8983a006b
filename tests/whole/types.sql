-- Every type, each with its edge values, in three tables: its values and arrays of them behind another key, the values as the key
-- (where the type has one), and the values without any key under REPLICA IDENTITY FULL, with rows that are equal.
CREATE SCHEMA typed;
CREATE SCHEMA ext;
CREATE EXTENSION citext SCHEMA ext;
CREATE EXTENSION hstore SCHEMA ext;
CREATE EXTENSION ltree SCHEMA ext;
CREATE EXTENSION cube SCHEMA ext;
CREATE EXTENSION seg SCHEMA ext;
CREATE EXTENSION isn SCHEMA ext;
CREATE EXTENSION intarray SCHEMA ext;
CREATE EXTENSION lo SCHEMA ext;

CREATE TYPE typed.mood AS ENUM ('sad', 'o''k', 'ha"ppy', '', ' ');
CREATE TYPE typed.pair AS (a integer, b text, c typed.mood);
CREATE TYPE typed.nested AS (p typed.pair, ps typed.pair[], at timestamptz, m typed.mood[]);
CREATE DOMAIN typed.positive AS integer CHECK (VALUE > 0);
CREATE DOMAIN typed.small AS typed.positive CHECK (VALUE < 1000);
CREATE DOMAIN typed.smalls AS typed.small[] CHECK (cardinality(VALUE) < 10);
CREATE DOMAIN typed.of_pair AS typed.pair CHECK ((VALUE).a > 0);
CREATE TYPE typed.with_domain AS (s typed.small, ss typed.smalls, o typed.of_pair);
CREATE TYPE typed.span AS RANGE (subtype = float8, subtype_diff = float8mi);
CREATE TYPE typed.words AS RANGE (subtype = text, collation = "C");
CREATE COLLATION typed.nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE SEQUENCE typed.referred;
CREATE FUNCTION typed.referred(integer) RETURNS integer LANGUAGE sql AS 'SELECT 1';

-- Which types have gone into tables.
CREATE TABLE typed.kind (name text PRIMARY KEY, type text NOT NULL, has_key boolean NOT NULL);

CREATE FUNCTION pg_temp.of_type(kind text, type text, has_key boolean, vals text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    -- Where the database's name says so, only what the whole stream may carry in binary.
    in_binary boolean := current_database() = 'whole_binary';
    safe text[] := '{bool,bytea,quoted_char,name,int8,int2,int4,text,json,point,lseg,path,box,polygon,line,cidr,float4,float8,circle,macaddr8,macaddr,inet,bpchar,varchar,date,time,timestamp,timestamptz,interval,timetz,bit,varbit,numeric,uuid,jsonb,tsvector,int4range,numrange,tsrange,tstzrange,daterange,int8range,mood,positive,small,nocase}';
    arrays text[] := '{bool,bytea,int8,int2,int4,text,float4,float8,bpchar,varchar,date,timestamp,timestamptz,interval,numeric,uuid,jsonb,json,nocase}';
    has_array boolean := kind <> ALL ('{oidvector,int2vector,smalls}') AND (NOT in_binary OR kind = ANY (arrays));
BEGIN
    IF in_binary AND kind <> ALL (safe) THEN RETURN; END IF;
    INSERT INTO typed.kind VALUES (kind, type, has_key);
    EXECUTE format('CREATE TABLE typed.%I (id serial PRIMARY KEY, v %s %s)', 'value_' || kind, type, CASE WHEN has_array THEN ', a ' || split_part(type, ' COLLATE', 1) || '[]' END);
    EXECUTE format('CREATE TABLE typed.%I (v %s, n integer)', 'full_' || kind, type);
    EXECUTE format('ALTER TABLE typed.%I REPLICA IDENTITY FULL', 'full_' || kind);
    FOR i IN 1 .. cardinality(vals) LOOP
        EXECUTE format('INSERT INTO typed.%I (v) VALUES (%L)', 'value_' || kind, vals[i]);
    END LOOP;
    IF has_array THEN
        EXECUTE format('UPDATE typed.%1$I SET a = ARRAY[v, NULL, v] WHERE id %% 3 = 0', 'value_' || kind);
        EXECUTE format('INSERT INTO typed.%1$I (v, a) SELECT NULL, array_agg(v) FROM typed.%1$I', 'value_' || kind);
        EXECUTE format('INSERT INTO typed.%1$I (v, a) SELECT NULL, array_fill((SELECT v FROM typed.%1$I WHERE id = 1), ARRAY[2, 3], ARRAY[-1, 5])', 'value_' || kind);
        EXECUTE format('INSERT INTO typed.%1$I (a) VALUES (''{}''), (''{NULL}'')', 'value_' || kind);
    ELSE
        EXECUTE format('INSERT INTO typed.%1$I (v) VALUES (NULL)', 'value_' || kind);
    END IF;
    -- Each twice, and NULL.
    EXECUTE format('INSERT INTO typed.%I SELECT v, id %% 3 FROM typed.%I, generate_series(1, 2)', 'full_' || kind, 'value_' || kind);
    IF has_key THEN
        EXECUTE format('CREATE TABLE typed.%I (k %s PRIMARY KEY, n integer)', 'key_' || kind, type);
        EXECUTE format('INSERT INTO typed.%I SELECT v, id FROM typed.%I WHERE v IS NOT NULL ON CONFLICT DO NOTHING', 'key_' || kind, 'value_' || kind);
    END IF;
END $$;

SELECT pg_temp.of_type('bool', 'boolean', true, '{t,f}');
SELECT pg_temp.of_type('bytea', 'bytea', true, ARRAY['', '\x00', '\x5c00ff0a0d27', '\x' || repeat('00ff', 3000)]);
SELECT pg_temp.of_type('quoted_char', '"char"', true, ARRAY['a', '', '\', ' ', E'\t', '''', '"']);
SELECT pg_temp.of_type('name', 'name', true, ARRAY['', 'a "b"', repeat('x', 63)]);
SELECT pg_temp.of_type('int8', 'bigint', true, ARRAY['-9223372036854775808', '9223372036854775807', '0']);
SELECT pg_temp.of_type('int2', 'smallint', true, ARRAY['-32768', '32767', '0']);
SELECT pg_temp.of_type('int4', 'integer', true, ARRAY['-2147483648', '2147483647', '0']);
SELECT pg_temp.of_type('text', 'text', true, ARRAY['', '\N', 'NULL', E'\t\n\\', repeat('é', 2000), 'a', 'A', 'a ']);
SELECT pg_temp.of_type('nocase', 'text COLLATE typed.nocase', true, ARRAY['abc', 'ABD', '', 'x ']);
SELECT pg_temp.of_type('varchar', 'varchar(10)', true, ARRAY['', 'ten chars ', 'ü']);
SELECT pg_temp.of_type('bpchar', 'char(5)', true, ARRAY['', 'a', 'abcde', '  a']);
SELECT pg_temp.of_type('float4', 'real', true, ARRAY['NaN', 'Infinity', '-Infinity', '-0', '1e-45', '3.4028235e38', '0.1', '1.17549435e-38']);
SELECT pg_temp.of_type('float8', 'double precision', true, ARRAY['NaN', 'Infinity', '-Infinity', '-0', '5e-324', '1.7976931348623157e308', '0.1', '2.2250738585072014e-308', '0.30000000000000004']);
SELECT pg_temp.of_type('numeric', 'numeric', true, ARRAY['NaN', 'Infinity', '-Infinity', '0', '0.000', '1.10', '-1e-16383', '1e-1000', '1' || repeat('0', 131071), repeat('9', 200) || '.' || repeat('9', 16383)]);
SELECT pg_temp.of_type('numeric_scale', 'numeric(5, -2)', true, ARRAY['1234567', '-99', 'NaN']);
SELECT pg_temp.of_type('money', 'money', true, ARRAY['-92233720368547758.08', '92233720368547758.07', '0.01']);
SELECT pg_temp.of_type('date', 'date', true, ARRAY['infinity', '-infinity', '4713-01-01 BC', '5874897-12-31', '2000-02-29', '0001-12-31 BC']);
SELECT pg_temp.of_type('time', 'time', true, ARRAY['00:00', '24:00', '23:59:59.999999']);
SELECT pg_temp.of_type('timetz', 'timetz', true, ARRAY['00:00+15:59:59', '24:00-15:59:59', '12:00+00', '04:05:06.789-08']);
SELECT pg_temp.of_type('timestamp', 'timestamp', true, ARRAY['infinity', '-infinity', '4713-01-01 00:00:00 BC', '294276-12-31 23:59:59.999999', '2024-03-31 02:30']);
SELECT pg_temp.of_type('timestamptz', 'timestamptz', true, ARRAY['infinity', '-infinity', '4713-01-01 00:00:00+00 BC', '294276-12-31 23:59:59.999999+00', '1890-01-01 00:00:00 Europe/Amsterdam', '2024-10-27 02:30+01']);
SELECT pg_temp.of_type('timestamp_0', 'timestamp(0)', true, ARRAY['2024-01-01 00:00:00.5']);
SELECT pg_temp.of_type('interval', 'interval', true, ARRAY['0', '178000000 years', '-178000000 years', '1 year -2 mons 3 days -04:05:06.789', '-1 day 25:00', '24:00', '1 day', '-00:00:00.000001']);
SELECT pg_temp.of_type('interval_day', 'interval day to second(3)', true, ARRAY['1 day 02:03:04.5678']);
SELECT pg_temp.of_type('bit', 'bit(3)', true, ARRAY['000', '101']);
SELECT pg_temp.of_type('varbit', 'bit varying', true, ARRAY['', '0', '00', repeat('10', 500)]);
SELECT pg_temp.of_type('inet', 'inet', true, ARRAY['0.0.0.0/0', '192.168.1.7/24', '192.168.1.7', '::', '::ffff:1.2.3.4/128', 'fe80::1/10']);
SELECT pg_temp.of_type('cidr', 'cidr', true, ARRAY['0.0.0.0/0', '192.168.1.0/24', '::/0', 'fe80::/10']);
SELECT pg_temp.of_type('macaddr', 'macaddr', true, ARRAY['00:00:00:00:00:00', 'ff:ff:ff:ff:ff:fe']);
SELECT pg_temp.of_type('macaddr8', 'macaddr8', true, ARRAY['00:00:00:00:00:00:00:00', '08:00:2b:01:02:03:04:05']);
SELECT pg_temp.of_type('uuid', 'uuid', true, ARRAY['00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff']);
SELECT pg_temp.of_type('point', 'point', false, ARRAY['(0,-0)', '(NaN,Infinity)', '(1e-300,1e300)']);
SELECT pg_temp.of_type('lseg', 'lseg', false, ARRAY['[(0,0),(1,1)]', '[(1,1),(1,1)]']);
SELECT pg_temp.of_type('line', 'line', false, ARRAY['{1,-1,0}', '{0,1,-0.5}']);
SELECT pg_temp.of_type('box', 'box', false, ARRAY['(1,1),(0,0)', '(Infinity,1),(-Infinity,0)']);
SELECT pg_temp.of_type('path', 'path', false, ARRAY['[(0,0),(1,1),(2,0)]', '((0,0),(1,1),(2,0))', '[(0,0)]']);
SELECT pg_temp.of_type('polygon', 'polygon', false, ARRAY['((0,0),(1,1),(2,0))', '((0.1,0.2))']);
SELECT pg_temp.of_type('circle', 'circle', false, ARRAY['<(0,0),0>', '<(1,2),0.1>']);
SELECT pg_temp.of_type('tsvector', 'tsvector', true, ARRAY['', 'a:1A fat:2B,4C cat:5', '''it''''s'' ''back\\slash'' '' ''']);
SELECT pg_temp.of_type('tsquery', 'tsquery', true, ARRAY['', 'fat & (rat | !cat)', 'a <-> b', '''it''''s'':AB*', 'a <5> b']);
SELECT pg_temp.of_type('json', 'json', false, ARRAY['{"a": 1, "a":   2}', 'null', '"\u0041\\"', '[1,  2.50, 1e400]', ' {"b":2,"a":1} ']);
SELECT pg_temp.of_type('jsonb', 'jsonb', true, ARRAY['{"a": 1, "a": 2}', 'null', '"é\\"', '[1, 2.50, -0.0]', '{}', '1.0', '12345678901234567890.123456789']);
SELECT pg_temp.of_type('jsonpath', 'jsonpath', false, ARRAY['$.a[*] ? (@.b > 1)', 'strict $."it''s"', '$.** ? (@ like_regex "^a" flag "i")']);
SELECT pg_temp.of_type('xml', 'xml', false, ARRAY['', '<a/>', 'text <b>and</b> more &amp; <![CDATA[<x>]]>', '<?xml version="1.0" encoding="UTF-8"?><a>ü</a>', '<!DOCTYPE a><a/>', '<!-- c --><a xmlns:x="y" x:z="1"/>']);
SELECT pg_temp.of_type('int4range', 'int4range', true, ARRAY['empty', '(,)', '[1,5)', '[5,)', '(,-3]']);
SELECT pg_temp.of_type('int8range', 'int8range', true, ARRAY['empty', '[-9223372036854775808,9223372036854775807)']);
SELECT pg_temp.of_type('numrange', 'numrange', true, ARRAY['(1.10,2.20]', '[NaN,NaN]', '(-Infinity,Infinity)', 'empty']);
SELECT pg_temp.of_type('tsrange', 'tsrange', true, ARRAY['["2024-01-01 00:00","2024-01-02 00:00")', '(infinity,infinity]', '[-infinity,)']);
SELECT pg_temp.of_type('tstzrange', 'tstzrange', true, ARRAY['["2024-01-01 00:00+01","2024-01-02 00:00-08")', '(,)']);
SELECT pg_temp.of_type('daterange', 'daterange', true, ARRAY['[2024-01-01,2024-02-01)', '[infinity,infinity]', '["0044-03-15 BC",2024-01-01)']);
SELECT pg_temp.of_type('int4multirange', 'int4multirange', true, ARRAY['{}', '{[1,3),[5,8)}', '{(,)}']);
SELECT pg_temp.of_type('nummultirange', 'nummultirange', true, ARRAY['{(1.10,2.20],[3,)}', '{}']);
SELECT pg_temp.of_type('tstzmultirange', 'tstzmultirange', true, ARRAY['{["2024-01-01 00:00+01","2024-01-02 00:00-08")}']);
SELECT pg_temp.of_type('datemultirange', 'datemultirange', true, ARRAY['{[2024-01-01,2024-02-01),[2025-01-01,)}']);
SELECT pg_temp.of_type('span', 'typed.span', true, ARRAY['[0.1,0.2)', '(-Infinity,NaN]', 'empty']);
SELECT pg_temp.of_type('words', 'typed.words', true, ARRAY['[a,"b,""\\ ")', '["",z]', '(,)']);
SELECT pg_temp.of_type('spans', 'typed.span_multirange', true, ARRAY['{[0.1,0.2),[5,)}', '{}']);
SELECT pg_temp.of_type('pg_lsn', 'pg_lsn', true, ARRAY['0/0', 'FFFFFFFF/FFFFFFFF', '16/B374D848']);
SELECT pg_temp.of_type('pg_snapshot', 'pg_snapshot', false, ARRAY['10:20:10,14,15', '1:1:']);
SELECT pg_temp.of_type('txid_snapshot', 'txid_snapshot', false, ARRAY['10:20:10,14,15']);
SELECT pg_temp.of_type('xid', 'xid', false, ARRAY['0', '4294967295']);
SELECT pg_temp.of_type('xid8', 'xid8', true, ARRAY['0', '18446744073709551615']);
SELECT pg_temp.of_type('cid', 'cid', false, ARRAY['0', '4294967295']);
SELECT pg_temp.of_type('tid', 'tid', true, ARRAY['(0,0)', '(4294967295,65535)']);
SELECT pg_temp.of_type('oid', 'oid', true, ARRAY['0', '4294967295']);
SELECT pg_temp.of_type('oidvector', 'oidvector', true, ARRAY['', '1 2 3']);
SELECT pg_temp.of_type('int2vector', 'int2vector', false, ARRAY['', '1 -2 3']);
SELECT pg_temp.of_type('refcursor', 'refcursor', false, ARRAY['', 'a cursor']);
SELECT pg_temp.of_type('aclitem', 'aclitem', false, ARRAY['postgres=r*w/postgres', '=X/postgres']);
SELECT pg_temp.of_type('regclass', 'regclass', true, ARRAY['typed.referred', 'pg_class', '-', '4294967295']);
SELECT pg_temp.of_type('regtype', 'regtype', true, ARRAY['typed.mood', 'typed.pair[]', 'double precision', '-']);
SELECT pg_temp.of_type('regproc', 'regproc', true, ARRAY['typed.referred', 'pg_catalog.now', '-']);
SELECT pg_temp.of_type('regprocedure', 'regprocedure', true, ARRAY['typed.referred(integer)', 'lower(text)']);
SELECT pg_temp.of_type('regoper', 'regoper', true, ARRAY['pg_catalog.||/', '0']);
SELECT pg_temp.of_type('regoperator', 'regoperator', true, ARRAY['+(integer,integer)', '-(NONE,bigint)']);
SELECT pg_temp.of_type('regrole', 'regrole', true, ARRAY['postgres', 'pg_monitor']);
SELECT pg_temp.of_type('regnamespace', 'regnamespace', true, ARRAY['typed', 'pg_catalog']);
SELECT pg_temp.of_type('regconfig', 'regconfig', true, ARRAY['english', 'simple']);
SELECT pg_temp.of_type('regdictionary', 'regdictionary', true, ARRAY['simple']);
SELECT pg_temp.of_type('regcollation', 'regcollation', true, ARRAY['"C"', 'typed.nocase']);
SELECT pg_temp.of_type('mood', 'typed.mood', true, ARRAY['sad', 'o''k', 'ha"ppy', '', ' ']);
SELECT pg_temp.of_type('positive', 'typed.positive', true, ARRAY['1', '2147483647']);
SELECT pg_temp.of_type('small', 'typed.small', true, ARRAY['1', '999']);
SELECT pg_temp.of_type('smalls', 'typed.smalls', false, ARRAY['{}', '{1,2}', '[-1:0]={3,NULL}']);
SELECT pg_temp.of_type('pair', 'typed.pair', true, ARRAY['(1,"a ""b"" \\,",sad)', '(,,)', '(2,"","")']);
SELECT pg_temp.of_type('nested', 'typed.nested', true, ARRAY['("(1,a,sad)","{""(2,\\""b\\"",)"",NULL}","2024-01-01 00:00:00+00","{sad,"""","" ""}")', '(,,,)', '("(,,)",{},infinity,{NULL})']);
SELECT pg_temp.of_type('with_domain', 'typed.with_domain', true, ARRAY['(5,"{1,2}","(1,a,sad)")', '(,,)']);
SELECT pg_temp.of_type('of_pair', 'typed.of_pair', false, ARRAY['(1,x,sad)']);
SELECT pg_temp.of_type('citext', 'ext.citext', true, ARRAY['Abc', '', 'ÄÖ']);
SELECT pg_temp.of_type('hstore', 'ext.hstore', true, ARRAY['', 'a=>1, b=>NULL', '"k \"\\"=>"v, => \\ "']);
SELECT pg_temp.of_type('ltree', 'ext.ltree', true, ARRAY['', 'Top.Science.Astronomy', 'a']);
SELECT pg_temp.of_type('lquery', 'ext.lquery', false, ARRAY['*.foo.*', '!a@*%|b.*{2,5}']);
SELECT pg_temp.of_type('ltxtquery', 'ext.ltxtquery', false, ARRAY['Europe & Russia*@ & !Transportation']);
SELECT pg_temp.of_type('cube', 'ext.cube', true, ARRAY['(1,2)', '(0),(1)', '(1e-300,-0),(NaN,Infinity)', '()']);
SELECT pg_temp.of_type('seg', 'ext.seg', true, ARRAY['1 .. 2', '5.0', '> 7', '~3.10', '1(+-)0.5', '< 0.10 .. 2']);
SELECT pg_temp.of_type('isbn', 'ext.isbn', true, ARRAY['978-0-393-04002-9', '0-11-000533-3']);
SELECT pg_temp.of_type('ean13', 'ext.ean13', true, ARRAY['0220356483481']);
SELECT pg_temp.of_type('upc', 'ext.upc', true, ARRAY['220356483481']);
SELECT pg_temp.of_type('lo', 'ext.lo', true, ARRAY['0', '4294967295']);

-- Numbers with a wrong check digit, as isn's weak mode takes them, and indexes by the extensions' operator classes.
CREATE TABLE typed.weak (id integer PRIMARY KEY, v integer);
DO $$ BEGIN
    IF current_database() <> 'whole_binary' THEN
        ALTER TABLE typed.weak ADD w ext.isbn13;
        PERFORM ext.isn_weak(true);
        INSERT INTO typed.weak VALUES (1, 1, '978-0-11-000533-4'), (2, 2, '9780393040029!'), (3, 3, '978-0-11-000533-5');
        PERFORM ext.isn_weak(false);
        CREATE INDEX ON typed.value_ltree USING gist (v ext.gist_ltree_ops);
        CREATE INDEX ON typed.value_hstore USING gin (v ext.gin_hstore_ops);
        CREATE INDEX ON typed.value_cube USING gist (v ext.gist_cube_ops);
        CREATE INDEX ON typed.value_seg USING gist (v ext.gist_seg_ops);
        CREATE INDEX ON typed.value_int4 USING gin (a ext.gin__int_ops);
    END IF;
END $$;
