-- Everything that a database holds besides the rows of its tables, one of each at least.

-- Schemas, with owner, comment and grants.
CREATE SCHEMA app AUTHORIZATION objects_owner;
COMMENT ON SCHEMA app IS 'it''s "the" application; -- TOC entry 1';
GRANT USAGE ON SCHEMA app TO objects_reader;
CREATE SCHEMA "Other Schema";

-- Extensions, with a version that is not the newest, in a schema of its own.
CREATE SCHEMA ext;
CREATE EXTENSION citext WITH SCHEMA ext;
CREATE EXTENSION hstore WITH SCHEMA ext VERSION '1.4';
CREATE EXTENSION pg_trgm;
COMMENT ON EXTENSION citext IS 'our own words about it';
CREATE EXTENSION postgres_fdw;

-- Types.
CREATE TYPE app.mood AS ENUM ('sad', 'ok', 'happy');
ALTER TYPE app.mood ADD VALUE 'better' BEFORE 'happy';
CREATE TYPE app.pair AS (a integer, b text COLLATE "C");
CREATE TYPE app.span AS RANGE (subtype = float8, subtype_diff = float8mi, multirange_type_name = app.spans);
CREATE DOMAIN app.positive AS integer CONSTRAINT is_positive CHECK (VALUE > 0);
ALTER DOMAIN app.positive ADD CONSTRAINT is_small CHECK (VALUE < 1000000) NOT VALID;
COMMENT ON DOMAIN app.positive IS 'more than none';
COMMENT ON CONSTRAINT is_positive ON DOMAIN app.positive IS 'really';
CREATE TYPE app.shell;
CREATE TYPE app.cents;
CREATE FUNCTION app.cents_in(cstring) RETURNS app.cents LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
CREATE FUNCTION app.cents_out(app.cents) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'int4out';
CREATE TYPE app.cents (INPUT = app.cents_in, OUTPUT = app.cents_out, LIKE = int4, CATEGORY = 'N');
ALTER TYPE app.mood OWNER TO objects_owner;
GRANT USAGE ON TYPE app.mood TO objects_reader;
REVOKE USAGE ON TYPE app.positive FROM PUBLIC;

-- Collations.
CREATE COLLATION app.german (provider = icu, locale = 'de-u-co-phonebk');
CREATE COLLATION app.caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);

-- Functions, procedures, aggregates.
CREATE FUNCTION app.add_cents(app.cents, app.cents) RETURNS app.cents LANGUAGE internal IMMUTABLE STRICT AS 'int4pl';
CREATE FUNCTION app.less_cents(app.cents, app.cents) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4lt';
CREATE FUNCTION app.same_cents(app.cents, app.cents) RETURNS boolean LANGUAGE internal IMMUTABLE STRICT AS 'int4eq';
CREATE FUNCTION app.hash_cents(app.cents) RETURNS integer LANGUAGE internal IMMUTABLE STRICT AS 'hashint4';
CREATE FUNCTION app.greet(who text DEFAULT 'you', VARIADIC rest integer[] DEFAULT '{}') RETURNS text LANGUAGE sql STABLE PARALLEL SAFE
    SECURITY DEFINER COST 7 SET search_path = app, pg_temp SET work_mem = '5MB' AS $$SELECT 'hello ' || who$$;
COMMENT ON FUNCTION app.greet IS 'polite';
REVOKE EXECUTE ON FUNCTION app.greet FROM PUBLIC;
GRANT EXECUTE ON FUNCTION app.greet TO "Objects Writer" WITH GRANT OPTION;
ALTER FUNCTION app.greet OWNER TO objects_owner;
CREATE FUNCTION app.standard(n integer) RETURNS integer LANGUAGE sql IMMUTABLE RETURN n * 2;
CREATE FUNCTION app.many() RETURNS TABLE (n integer, label text) LANGUAGE plpgsql ROWS 3 AS $body$
BEGIN
    RETURN QUERY VALUES (1, 'one'), (2, '-- Name: x; Type: TABLE; Schema: app; Owner: me');
END $body$;
CREATE PROCEDURE app.work(INOUT n integer) LANGUAGE plpgsql AS $$BEGIN n := n + 1; COMMIT; END$$;
CREATE AGGREGATE app.total(app.cents) (SFUNC = app.add_cents, STYPE = app.cents, COMBINEFUNC = app.add_cents, PARALLEL = SAFE);
CREATE AGGREGATE app.pick(float8 ORDER BY anyelement) (SFUNC = ordered_set_transition, STYPE = internal,
    FINALFUNC = percentile_disc_final, FINALFUNC_EXTRA);

-- Casts, operators, operator classes and families.
CREATE CAST (integer AS app.cents) WITHOUT FUNCTION AS ASSIGNMENT;
COMMENT ON CAST (integer AS app.cents) IS 'the same bits';
CREATE OPERATOR app.< (LEFTARG = app.cents, RIGHTARG = app.cents, FUNCTION = app.less_cents);
CREATE OPERATOR app.= (LEFTARG = app.cents, RIGHTARG = app.cents, FUNCTION = app.same_cents, HASHES, COMMUTATOR = OPERATOR(app.=));
CREATE OPERATOR FAMILY app.cents_family USING hash;
CREATE OPERATOR CLASS app.cents_hash DEFAULT FOR TYPE app.cents USING hash FAMILY app.cents_family AS
    OPERATOR 1 app.=, FUNCTION 1 app.hash_cents(app.cents);
CREATE TRANSFORM FOR app.cents LANGUAGE sql (FROM SQL WITH FUNCTION prsd_lextype(internal));

-- Text search.
CREATE TEXT SEARCH DICTIONARY app.plain (TEMPLATE = simple, STOPWORDS = english);
CREATE TEXT SEARCH PARSER app.words (START = prsd_start, GETTOKEN = prsd_nexttoken, END = prsd_end, HEADLINE = prsd_headline, LEXTYPES = prsd_lextype);
CREATE TEXT SEARCH TEMPLATE app.template (INIT = dsimple_init, LEXIZE = dsimple_lexize);
CREATE TEXT SEARCH CONFIGURATION app.search (PARSER = app.words);
ALTER TEXT SEARCH CONFIGURATION app.search ADD MAPPING FOR asciiword, word WITH app.plain;
ALTER TEXT SEARCH CONFIGURATION app.search OWNER TO objects_owner;
-- Without mappings.
CREATE TEXT SEARCH CONFIGURATION app.bare (PARSER = app.words);

-- Conversions and access methods.
CREATE CONVERSION app.latin FOR 'LATIN1' TO 'UTF8' FROM iso8859_1_to_utf8;
CREATE ACCESS METHOD heap_too TYPE TABLE HANDLER heap_tableam_handler;

-- Tables that the rest stands on.
CREATE TABLE app.item (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name ext.citext NOT NULL,
    price app.cents,
    mood app.mood DEFAULT 'ok',
    amount app.positive,
    label text COLLATE app.german,
    attributes ext.hstore,
    secret text
) WITH (fillfactor = 80, autovacuum_enabled = off);
ALTER TABLE app.item OWNER TO objects_owner;
ALTER TABLE app.item ALTER COLUMN label SET STATISTICS 200, ALTER COLUMN label SET STORAGE EXTERNAL,
    ALTER COLUMN name SET (n_distinct = -0.5), ALTER COLUMN secret SET COMPRESSION pglz;
COMMENT ON TABLE app.item IS 'what is sold';
COMMENT ON COLUMN app.item.secret IS 'hush';
GRANT SELECT (id, name), UPDATE (label) ON app.item TO objects_reader;
GRANT ALL ON app.item TO "Objects Writer" WITH GRANT OPTION;
GRANT USAGE ON SEQUENCE app.item_id_seq TO objects_reader;
CREATE INDEX item_name_trgm ON app.item USING gin (label gin_trgm_ops);
CREATE INDEX item_price ON app.item USING hash (price);
COMMENT ON INDEX app.item_price IS 'exact prices';
ALTER TABLE app.item CLUSTER ON item_pkey;
CREATE STATISTICS app.item_statistics (ndistinct, dependencies, mcv) ON name, mood FROM app.item;
ALTER STATISTICS app.item_statistics SET STATISTICS 300;
COMMENT ON STATISTICS app.item_statistics IS 'they go together';
ALTER TABLE app.item ENABLE ROW LEVEL SECURITY;
CREATE POLICY mine ON app.item AS RESTRICTIVE FOR UPDATE TO objects_reader USING (name = CURRENT_USER::text) WITH CHECK (true);
COMMENT ON POLICY mine ON app.item IS 'yours';
CREATE SEQUENCE "Other Schema"."Seq ""x""" AS smallint INCREMENT -1 CYCLE;
CREATE TABLE app.heaped (id integer PRIMARY KEY) USING heap_too;

-- Views.
CREATE VIEW app.cheap WITH (security_barrier, check_option = local) AS SELECT id, name, mood FROM app.item WHERE amount < 10;
ALTER VIEW app.cheap ALTER COLUMN mood SET DEFAULT 'sad';
GRANT SELECT ON app.cheap TO PUBLIC;
COMMENT ON VIEW app.cheap IS 'bargains';
CREATE RECURSIVE VIEW app.counted (n) AS SELECT 1 UNION ALL SELECT n + 1 FROM counted WHERE n < 3;
CREATE FUNCTION app.on_cheap() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NULL; END$$;
CREATE TRIGGER instead INSTEAD OF INSERT ON app.cheap FOR EACH ROW EXECUTE FUNCTION app.on_cheap();
CREATE RULE no_delete AS ON DELETE TO app.cheap DO INSTEAD NOTHING;

-- Materialized views: one that reads from another that is younger, one that has never been filled.
CREATE MATERIALIZED VIEW app.by_mood AS SELECT mood, count(*) AS items FROM app.item GROUP BY mood;
CREATE UNIQUE INDEX by_mood_key ON app.by_mood (mood);
CREATE MATERIALIZED VIEW app.moods AS SELECT count(*) AS moods FROM app.by_mood;
CREATE MATERIALIZED VIEW app.never AS SELECT 1 AS one WITH NO DATA;
ALTER MATERIALIZED VIEW app.by_mood OWNER TO objects_owner;
COMMENT ON MATERIALIZED VIEW app.by_mood IS 'counted now and then';

-- Event triggers.
CREATE FUNCTION app.watch() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN NULL; END$$;
CREATE EVENT TRIGGER watch_tables ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE') EXECUTE FUNCTION app.watch();
-- It writes down every statement, whoever makes it: what a migration does on the target must not be among them.
CREATE TABLE app.ddl_log (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, tag text);
CREATE FUNCTION app.log() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN INSERT INTO app.ddl_log (tag) VALUES (tg_tag); END$$;
CREATE EVENT TRIGGER log_all ON ddl_command_end EXECUTE FUNCTION app.log();
CREATE EVENT TRIGGER watch_nothing ON sql_drop EXECUTE FUNCTION app.watch();
ALTER EVENT TRIGGER watch_nothing DISABLE;
COMMENT ON EVENT TRIGGER watch_tables IS 'who did it';

-- Foreign data: the definitions, none of the rows.
CREATE FOREIGN DATA WRAPPER own_wrapper OPTIONS (debug 'true');
CREATE SERVER elsewhere TYPE 'postgres' VERSION '15' FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host 'nowhere.invalid', dbname 'x');
CREATE USER MAPPING FOR objects_reader SERVER elsewhere OPTIONS (user 'u', password 'mapping-secret');
CREATE USER MAPPING FOR PUBLIC SERVER elsewhere;
CREATE FOREIGN TABLE app.far (id integer OPTIONS (column_name 'no'), t text) SERVER elsewhere OPTIONS (table_name 'far');
COMMENT ON SERVER elsewhere IS 'far away';
GRANT USAGE ON FOREIGN SERVER elsewhere TO objects_reader;

-- Default privileges.
ALTER DEFAULT PRIVILEGES FOR ROLE objects_owner IN SCHEMA app GRANT SELECT ON TABLES TO objects_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE objects_owner REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC;

-- Publications and subscriptions are of this server's replication: they are not made on the target.
CREATE PUBLICATION somebodys FOR TABLE app.item (id, name) WHERE (id > 0);
CREATE PUBLICATION everybodys FOR ALL TABLES;
CREATE SUBSCRIPTION of_another CONNECTION 'host=nowhere.invalid password=subscription-secret' PUBLICATION p WITH (connect = false);

INSERT INTO app.item (name, price, mood, amount, label) SELECT 'n' || n, n, 'happy', n, 'x' FROM generate_series(1, 10) n;
REFRESH MATERIALIZED VIEW app.by_mood;
REFRESH MATERIALIZED VIEW app.moods;

-- Written into the catalog, because no server has such a provider loaded: restored where one has, named where not.
INSERT INTO pg_seclabel (objoid, classoid, objsubid, provider, label)
    VALUES ('app.item'::regclass, 'pg_class'::regclass, 0, 'absent_provider', 'top secret');
