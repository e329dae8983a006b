-- Puts DDL into the stream. Made by walferry, removed by `walferry clean`.
CREATE SCHEMA {schema};
GRANT USAGE ON SCHEMA {schema} TO PUBLIC;

-- What only its owner reads: by it a message proves that it comes from here. Anybody may write messages of any prefix.
CREATE TABLE {schema}.key (key bytea NOT NULL);
REVOKE ALL ON TABLE {schema}.key FROM {others};
INSERT INTO {schema}.key VALUES (pg_catalog.uuid_send(pg_catalog.gen_random_uuid()) OPERATOR(pg_catalog.||) pg_catalog.uuid_send(pg_catalog.gen_random_uuid()));

-- What happened, as its owner sees it: whoever runs DDL need not own the publications. It is told what only the caller knows.
CREATE FUNCTION {schema}.emit(v_event text, v_tag text, v_caller jsonb, v_context text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms'
SET DateStyle = 'ISO, YMD' SET IntervalStyle = 'postgres' SET TimeZone = 'UTC' SET extra_float_digits = '3'
SET bytea_output = 'hex' SET xmloption = 'content' SET lc_monetary = 'C' SET standard_conforming_strings = 'on'{messages}
AS $walferry$
DECLARE
    v_commands jsonb;
    v_dropped jsonb;
    v_rewritten jsonb;
    v_fired jsonb;
    v_nth integer;
    v_relations oid[];
    v_sent oid[];
    v_about oid[];
    v_age integer;
    v_functions oid[];
    v_types oid[];
    v_extensions oid[];
    v_new oid[];
    v_table record;
    v_unpublished jsonb := '[]';
    v_again text[] := '{}';
    v_statement text;
    v_content text;
    v_key bytea;
    v_stack text;
BEGIN
    -- Called by hand it would be told anything of the caller. The stack is in any language; its lines for functions begin alike, and
    -- nobody else makes functions in this schema.
    GET DIAGNOSTICS v_stack = PG_CONTEXT;
    IF NOT starts_with(split_part(v_stack, E'\n', 2), split_part(v_stack, '{schema_name}.emit(', 1) || '{schema_name}.capture()') THEN
        RAISE 'only the event triggers of walferry call this function';
    END IF;
    IF v_event = 'sql_drop' THEN
        SELECT jsonb_agg(jsonb_build_object('type', d.object_type, 'identity', d.object_identity, 'names', to_jsonb(d.address_names),
                   'object', CASE WHEN d.object_type IN ('table column', 'table constraint', 'trigger') THEN
                       format(CASE d.object_type WHEN 'table column' THEN 'column %I of table %I.%I'
                                  WHEN 'table constraint' THEN 'constraint %I of table %I.%I' ELSE 'trigger %I on table %I.%I' END,
                              d.address_names[3], d.address_names[1], d.address_names[2]) END,
                   'relid', CASE WHEN d.classid = 'pg_class'::regclass AND d.objsubid = 0 THEN d.objid::int8 END))
            INTO v_dropped FROM pg_event_trigger_dropped_objects() d
            WHERE NOT d.is_temporary AND d.object_identity NOT LIKE '%pg\_temp%' AND d.object_identity NOT LIKE 'pg\_toast.%'
              AND d.object_type NOT IN ('publication', 'publication relation', 'subscription');
        PERFORM set_config('walferry.dropped', coalesce(v_dropped, '[]')::text, true);
        RETURN true;
    END IF;
    IF v_event = 'table_rewrite' THEN
        v_rewritten := coalesce(nullif(current_setting('walferry.rewritten', true), ''), '[]')::jsonb
            || jsonb_build_object('relid', pg_event_trigger_table_rewrite_oid()::int8, 'reason', pg_event_trigger_table_rewrite_reason());
        PERFORM set_config('walferry.rewritten', v_rewritten::text, true);
        RETURN true;
    END IF;

    -- Which of the statements of its string it is, among those with its tag.
    v_fired := coalesce(nullif(current_setting('walferry.fired', true), ''), '{}')::jsonb;
    IF v_fired->>'at' IS DISTINCT FROM statement_timestamp()::text THEN
        v_fired := jsonb_build_object('at', statement_timestamp()::text);
    END IF;
    v_nth := coalesce((v_fired->>v_tag)::integer, 0) + 1;
    IF v_context = '' THEN
        PERFORM set_config('walferry.fired', (v_fired || jsonb_build_object(v_tag, v_nth))::text, false);
    END IF;
    v_dropped := coalesce(nullif(current_setting('walferry.dropped', true), ''), '[]')::jsonb;
    v_rewritten := coalesce(nullif(current_setting('walferry.rewritten', true), ''), '[]')::jsonb;
    IF v_dropped <> '[]' THEN
        PERFORM set_config('walferry.dropped', '', true);
    END IF;
    IF v_rewritten <> '[]' THEN
        PERFORM set_config('walferry.rewritten', '', true);
    END IF;

    SELECT jsonb_agg(jsonb_build_object('type', d.object_type, 'identity', d.object_identity)),
           array_agg(d.objid) FILTER (WHERE d.classid = 'pg_proc'::regclass),
           array_agg(d.objid) FILTER (WHERE d.classid = 'pg_type'::regclass),
           array_agg(d.objid) FILTER (WHERE d.classid = 'pg_extension'::regclass),
           array_agg(d.objid) FILTER (WHERE d.object_type = 'table' AND d.command_tag IN ('CREATE TABLE', 'CREATE TABLE AS', 'SELECT INTO'))
        INTO v_commands, v_functions, v_types, v_extensions, v_new
        FROM pg_event_trigger_ddl_commands() d
        WHERE d.schema_name IS DISTINCT FROM 'pg_temp' AND (NOT d.in_extension OR v_tag LIKE '% EXTENSION');
    IF v_commands IS NULL AND v_dropped = '[]' THEN
        RETURN true;
    END IF;

    -- The tables that it is about, and the parts of partitioned ones.
    WITH RECURSIVE named(relid) AS (
        SELECT CASE WHEN d.classid = 'pg_class'::regclass
                        THEN coalesce((SELECT i.indrelid FROM pg_index i WHERE i.indexrelid = d.objid), d.objid)
                    WHEN d.classid = 'pg_constraint'::regclass THEN (SELECT k.conrelid FROM pg_constraint k WHERE k.oid = d.objid)
                    WHEN d.classid = 'pg_trigger'::regclass THEN (SELECT t.tgrelid FROM pg_trigger t WHERE t.oid = d.objid)
                    WHEN d.classid = 'pg_rewrite'::regclass THEN (SELECT r.ev_class FROM pg_rewrite r WHERE r.oid = d.objid) END
        FROM pg_event_trigger_ddl_commands() d
        UNION
        SELECT to_regclass(format('%I.%I', d->'names'->>0, d->'names'->>1))::oid FROM jsonb_array_elements(v_dropped) d
        WHERE d->>'type' IN ('table column', 'table constraint', 'trigger', 'rule', 'policy', 'default value')
        UNION
        SELECT t.typrelid FROM pg_type t WHERE t.oid = ANY (v_types) AND t.typtype = 'c'
    ), whole(relid) AS (
        SELECT relid FROM named UNION SELECT i.inhrelid FROM pg_inherits i JOIN whole ON whole.relid = i.inhparent
    )
    SELECT array_agg(c.oid) INTO v_relations FROM pg_class c WHERE c.oid IN (SELECT relid FROM whole) AND c.relpersistence <> 't';
    v_about := coalesce(v_relations, '{}');
    -- And all whose rows of the catalog were written lately: what else it did, and of GRANT, which does not say to what. What others have
    -- done and committed comes before this in the stream.
    v_age := age(pg_snapshot_xmin(pg_current_snapshot())::xid);
    v_relations := v_about || ARRAY(SELECT c.oid FROM pg_class c WHERE age(c.xmin) <= v_age AND c.relpersistence <> 't'
                                    AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c') AND c.oid <> ALL (v_about));
    v_functions := v_functions || ARRAY(SELECT p.oid FROM pg_proc p WHERE age(p.xmin) <= v_age);
    v_relations := v_relations
        || ARRAY(SELECT i.indexrelid FROM pg_index i WHERE i.indrelid = ANY (v_relations));

    -- A new table is in the stream from here on; one that got or lost its replica identity changes its publication, because a table
    -- without one in the first would make the application's own updates fail.
    FOR v_table IN
        SELECT c.oid, c.relpersistence, n.nspname, c.relname, format('%I.%I', n.nspname, c.relname) AS quoted, c.oid = ANY (v_new) AS is_new,
               c.relreplident = 'f' OR EXISTS (
                   SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indimmediate AND i.indisvalid
                       AND i.indpred IS NULL AND i.indexprs IS NULL
                       AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident)
               ) AS is_usable,
               EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                       WHERE r.prrelid = c.oid AND p.pubname = {publication}) AS is_in_first,
               EXISTS (SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
                       WHERE r.prrelid = c.oid AND p.pubname = {inserts}) AS is_in_second
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = ANY (v_relations) AND c.relkind = 'r' AND c.relpersistence = 'p'
    LOOP
        -- Rows that were written before it was in the stream are written again, once it is.
        IF v_table.is_new AND v_tag IN ('CREATE TABLE AS', 'SELECT INTO') THEN
            SELECT format('CREATE TABLE %s (%s)', v_table.quoted, coalesce(string_agg(
                       format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
                       || CASE WHEN a.attcollation <> t.typcollation THEN format(' COLLATE %I.%I', cn.nspname, l.collname) ELSE '' END,
                       ', ' ORDER BY a.attnum), ''))
                INTO v_statement
                FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid LEFT JOIN pg_collation l ON l.oid = a.attcollation
                LEFT JOIN pg_namespace cn ON cn.oid = l.collnamespace
                WHERE a.attrelid = v_table.oid AND a.attnum > 0 AND NOT a.attisdropped;
            IF pg_relation_size(v_table.oid) > {rows_max} THEN
                v_unpublished := v_unpublished || jsonb_build_object('relid', v_table.oid::int8, 'table', v_table.quoted,
                    'error', format('%s of rows were written to it before it was in the stream', pg_size_pretty(pg_relation_size(v_table.oid))));
                CONTINUE;
            END IF;
            IF pg_relation_size(v_table.oid) > 0 THEN
                v_again := v_again || v_table.quoted;
            END IF;
        END IF;
        BEGIN
            IF v_table.is_usable AND NOT v_table.is_in_first AND (v_table.is_new OR v_table.is_in_second) THEN
                IF v_table.is_in_second THEN
                    EXECUTE format('ALTER PUBLICATION %I DROP TABLE ONLY %s', {inserts}, v_table.quoted);
                END IF;
                EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %s', {publication}, v_table.quoted);
            ELSIF NOT v_table.is_usable AND NOT v_table.is_in_second AND (v_table.is_new OR v_table.is_in_first) THEN
                IF v_table.is_in_first THEN
                    EXECUTE format('ALTER PUBLICATION %I DROP TABLE ONLY %s', {publication}, v_table.quoted);
                END IF;
                EXECUTE format('ALTER PUBLICATION %I ADD TABLE ONLY %s', {inserts}, v_table.quoted);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            v_again := array_remove(v_again, v_table.quoted);
            v_unpublished := v_unpublished || jsonb_build_object('relid', v_table.oid::int8, 'table', v_table.quoted, 'error', SQLERRM);
        END;
    END LOOP;

    -- Of tables whose rows are in the stream.
    v_sent := ARRAY(
        SELECT c.oid FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid
        LEFT JOIN pg_class t ON t.oid = coalesce(i.indrelid, c.oid) AND t.relkind = 'r'
        WHERE c.oid = ANY (v_relations) AND (t.oid IS NULL OR EXISTS (
            SELECT FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid
            WHERE r.prrelid = t.oid AND p.pubname IN ({publication}, {inserts}))));

    v_content := jsonb_build_object(
        'tag', v_tag, 'query', current_query(), 'nth', v_nth, 'context', v_context, 'caller', v_caller, 'statement', v_statement,
        'commands', coalesce(v_commands, '[]'), 'dropped', v_dropped, 'rewritten', v_rewritten,
        'unpublished', v_unpublished,
        'tables', coalesce((
            SELECT jsonb_agg(jsonb_build_object('relid', c.oid::int8, 'schema', n.nspname, 'name', c.relname,
                       'unlogged', c.relpersistence = 'u', 'is_partition', c.relispartition, 'identity', c.relreplident::text,
                       'relfilenode', c.relfilenode::int8, 'is_new', coalesce(c.oid = ANY (v_new), false), 'is_about', c.oid = ANY (v_about)))
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.oid = ANY (v_sent) AND c.relkind = 'r' AND {user_relation}), '[]'),
        'columns', coalesce((
            SELECT jsonb_agg(jsonb_build_object('relid', q.relid::int8, 'missing', CASE WHEN m.atthasmissing THEN (m.attmissingval::text::text[])[1] END,
                       'column', jsonb_build_object('name', q.name, 'number', q.number, 'type_oid', q.type_oid::int8, 'type_name', q.type_name,
                           'type_modifier', q.type_modifier, 'not_null', q.not_null, 'identity_always', q.identity_always,
                           'binary_safe', q.binary_safe, 'byte_equal', q.byte_equal, 'equality_schema', q.equality_schema))
                       ORDER BY q.relid, q.number)
            FROM ({columns}) q(relid, name, number, type_oid, type_name, type_modifier, not_null, identity_always, binary_safe, byte_equal,
                               equality_schema)
            JOIN pg_attribute m ON m.attrelid = q.relid AND m.attnum = q.number), '[]'),
        'indexes', coalesce((
            SELECT jsonb_agg(jsonb_build_object('relid', q.relid::int8, 'index', jsonb_build_object('columns', q.columns, 'primary', q.is_primary,
                       'replica_identity', q.is_identity, 'names_one_row', q.names_one_row)))
            FROM ({indexes}) q(relid, columns, is_primary, is_identity, names_one_row)), '[]'),
        'fingerprint', coalesce((SELECT jsonb_object_agg(q.object, q.hash) FROM ({fingerprint}) q(object, hash) WHERE q.object IS NOT NULL), '{}'),
        'definition', coalesce((SELECT jsonb_object_agg(q.object, q.hash) FROM ({definition}) q(object, hash) WHERE q.object IS NOT NULL), '{}')
    )::text;
    -- A hash over this transaction and what is said, nested so that nothing can be appended to it.
    SELECT k.key INTO STRICT v_key FROM {schema}.key k;
    PERFORM pg_logical_emit_message(true, {prefix}, convert_to(
        encode(sha256(v_key || sha256(v_key || convert_to(pg_current_xact_id()::xid::text || '/' || v_content, 'UTF8'))), 'hex') || v_content,
        'UTF8'));
    -- A message is decoded at the end of its record, which is where the next one begins: beside the subtransaction that this is, the
    -- row of that one could come first. This one is in between.
    PERFORM pg_logical_emit_message(true, {prefix_end}, '');

    FOREACH v_statement IN ARRAY v_again LOOP
        EXECUTE format('WITH gone AS (DELETE FROM ONLY %s RETURNING *) INSERT INTO %s SELECT * FROM gone', v_statement, v_statement);
    END LOOP;
    RETURN true;
END
$walferry$;

-- As whoever runs the DDL. Whatever goes wrong here, the DDL goes on; the stream then says that it could not be told.
CREATE FUNCTION {schema}.capture() RETURNS event_trigger LANGUAGE plpgsql AS $walferry$
DECLARE
    v_context pg_catalog.text;
    v_told pg_catalog.bool;
BEGIN
    IF tg_tag OPERATOR(pg_catalog.~) '(PUBLICATION|SUBSCRIPTION|REINDEX)$'::pg_catalog.text
        OR pg_catalog.starts_with(pg_catalog.current_setting('application_name'), 'walferry')
    THEN
        RETURN;
    END IF;
    GET DIAGNOSTICS v_context = PG_CONTEXT;
    -- Not PERFORM, which would stand between the two on the stack.
    v_told := {schema}.emit(tg_event, tg_tag, pg_catalog.jsonb_build_object(
        'role', current_user, 'search_path', pg_catalog.current_setting('search_path'),
        'settings', pg_catalog.jsonb_build_object(
            'TimeZone', pg_catalog.current_setting('TimeZone'),
            'DateStyle', pg_catalog.current_setting('DateStyle'),
            'IntervalStyle', pg_catalog.current_setting('IntervalStyle'),
            'standard_conforming_strings', pg_catalog.current_setting('standard_conforming_strings'),
            'check_function_bodies', pg_catalog.current_setting('check_function_bodies'),
            'xmloption', pg_catalog.current_setting('xmloption'),
            'transform_null_equals', pg_catalog.current_setting('transform_null_equals'))),
        -- Without our own line.
        pg_catalog.regexp_replace(v_context, '^[^\n]*\n?', ''));
EXCEPTION WHEN OTHERS THEN
    BEGIN
        PERFORM pg_catalog.pg_logical_emit_message(true, {prefix}, pg_catalog.convert_to(
            pg_catalog.jsonb_build_object('tag', tg_tag, 'query', pg_catalog.current_query(), 'failed', SQLERRM)::pg_catalog.text, 'UTF8'));
    EXCEPTION WHEN OTHERS THEN
        RAISE LOG 'walferry could not tell of %: %', tg_tag, SQLERRM;
    END;
END
$walferry$;

CREATE EVENT TRIGGER {name} ON ddl_command_end EXECUTE FUNCTION {schema}.capture();
CREATE EVENT TRIGGER {name_drop} ON sql_drop EXECUTE FUNCTION {schema}.capture();
CREATE EVENT TRIGGER {name_rewrite} ON table_rewrite EXECUTE FUNCTION {schema}.capture();
