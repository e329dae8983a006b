//! Every name and every value that some syntax could stumble over goes from one server to the other, in the snapshot and in
//! the stream, in text and in binary.

use std::fmt::Write;

use tokio_postgres::Client;

use crate::support::{Migration, Servers};

/// What names can hold. `NAMES[a]` and `NAMES[b]` differ in the last byte of 63.
const NAMES: [&str; 44] = [
    "it's",
    "double\"quote",
    "\"",
    "'",
    "\\",
    "new\nline",
    "\n",
    "semi; DROP SCHEMA public CASCADE; --",
    "'); DROP SCHEMA public CASCADE; --",
    "back\\slash \\' \\n",
    "100%s %n %1$s %% %I",
    "%",
    "naïve Ünïcode 表名",
    "שלום مرحبا \u{202e}right to left",
    "🦀🚢 emoji 👩‍👩‍👧",
    "e\u{301}", // the same to a reader as the next one
    "\u{e9}",
    "ééééééééééééééééééééééééééééééé1",
    "ééééééééééééééééééééééééééééééé2",
    "abcdefghijklmnopqrstuvwxyz_abcdefghijklmnopqrstuvwxyz_abcdefghi",
    "select",
    "table",
    "user",
    "NULL",
    "Upper Case",
    " leading and trailing ",
    " ",
    "-x",
    "--help",
    "{0} {name} {{}}",
    "$1 $$ $body$ ${HOME} $(id) `id`",
    "tab\tcr\r bell\u{7} escape\u{1b}[31m delete\u{7f}",
    "a.b",
    "*",
    "x; Type: INDEX; Schema: public; Owner: me",
    "y; Type: FK CONSTRAINT; Schema: public; Owner: me",
    "/* comment",
    "-- comment",
    "E'\\''",
    "U&\"d\\0061t\"",
    "\\.",
    "\\restrict abc",
    "--\n-- TOC entry 7 (class 1259 OID 100)",
    "walferry",
];

/// Databases that look like something else, where pg_dump, libpq or `ALTER DATABASE` could take them for it.
const IN_TEXT: &str = "Ünï \"q\" 'x' = \\ % %41 🦀 /?#@:&;\n$(id)";
const IN_BINARY: &str = "host=nowhere.invalid dbname=postgres";

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn constant(value: &str) -> String {
    format!(" E'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// A name of the list, counted on from one schema's own.
fn name(schema: usize, offset: usize) -> String {
    quoted(NAMES[(schema + offset) % NAMES.len()])
}

/// A schema of each name, with objects of the names that follow it.
fn schema(of: usize) -> String {
    let n = |offset| name(of, offset);
    // A schema of this name is the ledger's.
    let schema = if NAMES[of] == "walferry" { quoted("Walferry") } else { n(0) };
    let [table, sequence, root] = [0, 2, 4].map(|offset| format!("{schema}.{}", n(offset)));
    let [leaf, rest, view, mood, domain] = [5, 6, 7, 8, 9].map(|offset| format!("{schema}.{}", n(offset)));
    let (child, materialized) = (format!("{schema}.{}", n(10)), format!("{schema}.{}", n(11)));
    let function = format!("{schema}.{}", n(12));
    let (own, text) = (n(0), n(1));
    format!(
        "CREATE SCHEMA {schema};
         CREATE TYPE {mood} AS ENUM ({label}, {other_label});
         CREATE DOMAIN {domain} AS text CONSTRAINT {} CHECK (VALUE <> {label});
         CREATE SEQUENCE {sequence} START 40;
         CREATE TABLE {table} ({own} int DEFAULT nextval({sequence_text}::regclass), {text} text NOT NULL DEFAULT {label},
             {} {mood}, {} {domain}, {} bytea, {} text,
             CONSTRAINT {} PRIMARY KEY ({text}, {own}), CONSTRAINT {} CHECK ({own} > -1000), CONSTRAINT {} UNIQUE ({own}));
         CREATE INDEX {index_name} ON {table} (lower({text}), {});
         CREATE TABLE {root} ({own} int NOT NULL, {text} text, CONSTRAINT {} PRIMARY KEY ({own})) PARTITION BY RANGE ({own});
         CREATE TABLE {leaf} PARTITION OF {root} FOR VALUES FROM (0) TO (100);
         CREATE TABLE {rest} PARTITION OF {root} DEFAULT;
         CREATE TABLE {child} ({own} int, {text} text, CONSTRAINT {} FOREIGN KEY ({own}) REFERENCES {table} ({own}));
         ALTER TABLE {child} REPLICA IDENTITY FULL;
         CREATE VIEW {view} AS SELECT {own} AS {} FROM {table};
         CREATE MATERIALIZED VIEW {materialized} AS SELECT {text} FROM {table} WHERE {own} < 0;
         CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS {} ;
         CREATE TRIGGER {} BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION {function}();
         COMMENT ON TABLE {table} IS {comment};
         COMMENT ON COLUMN {table}.{text} IS {comment};
         COMMENT ON CONSTRAINT {} ON {table} IS {comment};
         INSERT INTO {table} ({own}, {text}, {}, {}, {}) SELECT i, {label} || i, {label}, {other_label}, '\\x00ff' FROM generate_series(1, 5) i;
         INSERT INTO {root} SELECT i, {label} FROM generate_series(0, 200, 50) i;
         INSERT INTO {child} SELECT 1 + i % 5, {label} FROM generate_series(1, 4) i",
        n(13), n(2), n(3), n(4), n(5), n(14), n(15), n(16), n(2), n(17), n(18), n(19),
        constant("BEGIN RETURN NEW; END"), n(20), n(14), n(2), n(3), n(4),
        index_name = n(1),
        label = constant(NAMES[of]),
        other_label = constant(NAMES[(of + 1) % NAMES.len()]),
        sequence_text = constant(&sequence),
        comment = constant(NAMES[(of + 5) % NAMES.len()]),
    )
}

/// Every kind of change of every table of a schema.
fn changes(of: usize, round: usize) -> String {
    let n = |offset| name(of, offset);
    let schema = if NAMES[of] == "walferry" { quoted("Walferry") } else { n(0) };
    let [table, root, leaf, child] = [0, 4, 5, 10].map(|offset| format!("{schema}.{}", n(offset)));
    let (own, text, mood, domain, bytes, long) = (n(0), n(1), n(2), n(3), n(4), n(5));
    let label = constant(NAMES[of]);
    let new = 1000 * (round + 1);
    format!(
        "BEGIN;
         INSERT INTO {table} ({text}, {mood}, {bytes}, {long}) VALUES ({label} || 'a{round}', {label}, '\\x0102', repeat({label}, 4000));
         INSERT INTO {table} ({own}, {text}) VALUES ({new}, {label} || 'b'), ({new} + 1, {label} || 'c'), ({new} + 2, {label} || 'd');
         UPDATE {table} SET {domain} = {label} || 'changed' WHERE {own} BETWEEN 1 AND 3;
         UPDATE {table} SET {text} = {text} || {label} WHERE {own} = {new};
         DELETE FROM {table} WHERE {own} = {new} + 1;
         UPDATE {table} SET {own} = 500000 WHERE {own} = {new} + 2;
         UPDATE {table} SET {own} = {new} + 2 WHERE {own} = {new};
         UPDATE {table} SET {own} = {new} WHERE {own} = 500000;
         INSERT INTO {root} VALUES ({new}, {label}), ({new} + 1, NULL);
         UPDATE {root} SET {own} = {round} + 1, {text} = {text} || {label} WHERE {own} = {new};
         DELETE FROM {leaf} WHERE {own} = {round} + 50;
         UPDATE {child} SET {text} = {label} || '{round}' WHERE {own} = 2;
         DELETE FROM {child} WHERE {own} = 3;
         INSERT INTO {child} VALUES (3, NULL), (3, {label}), (3, {label});
         COMMIT",
    )
}

/// Characters of every class: controls, separators, surrogate neighbours, non-characters, marks, private use, the last one.
fn characters() -> Vec<char> {
    let ranges =
        [1..=0x2ff, 0x300..=0x303, 0x590..=0x600, 0x1f00..=0x1f0f, 0x2000..=0x206f, 0x2fff..=0x3010, 0xd7f0..=0xe010];
    let more = [
        0xfdd0..=0xfdef,
        0xfe00..=0xfe0f,
        0xfeff..=0xfeff,
        0xfff0..=0x1000f,
        0x1f980..=0x1f98f,
        0xe0000..=0xe007f,
        0x10_fff0..=0x10_ffff,
    ];
    ranges.into_iter().chain(more).flatten().filter_map(char::from_u32).collect()
}

/// A table whose keys and values are what COPY, SQL and the wire escape.
fn values() -> String {
    let texts = [
        "",
        "\\N",
        "\\.",
        "\\.\n",
        "\n\\.\n",
        "\t",
        "\n",
        "\r",
        "\r\n",
        "\\",
        "\\\\",
        "\\0",
        "\\000",
        "\\x00",
        "\u{1}",
        "%00",
        "&#0;",
        "NULL",
        "null",
        "''",
        "'",
        "\"",
        "$$",
        ",",
        "{}",
        "{NULL}",
        "(,)",
        " ",
        "  lead",
        "trail  ",
        "\\t\\n",
        "\u{b}\u{c}\u{8}",
    ];
    let mut sql = "CREATE TABLE public.\"values\" (k text PRIMARY KEY, t text, s bytea, a text[], j jsonb);
         CREATE TABLE public.bytes (b bytea PRIMARY KEY, \"char\" \"char\", v varchar(10), c char(5));
         INSERT INTO public.bytes SELECT decode(lpad(to_hex(i), 2, '0'), 'hex'), i::\"char\", NULL, '' FROM generate_series(0, 127) i;
         INSERT INTO public.bytes SELECT decode(lpad(to_hex(i), 2, '0'), 'hex'), NULL, E'\\\\N\\t', E'\\n' FROM generate_series(128, 255) i;
         INSERT INTO public.bytes SELECT string_agg(b, '' ORDER BY b), 'x', '', 'abc' FROM public.bytes;
         INSERT INTO public.bytes VALUES ('', NULL, NULL, NULL);"
        .to_owned();
    for text in NAMES.into_iter().chain(texts) {
        let text = constant(text);
        let _ = write!(
            sql,
            "INSERT INTO public.\"values\" VALUES ({text}, {text}, convert_to({text}, 'UTF8'), ARRAY[{text}, NULL, {text}], jsonb_build_object({text}, {text})) \
             ON CONFLICT DO NOTHING;"
        );
    }
    for letter in characters() {
        let code = u32::from(letter);
        let _ = write!(
            sql,
            "INSERT INTO public.\"values\" (k, t) VALUES ('U+' || {code}, chr({code})) ON CONFLICT DO NOTHING;"
        );
    }
    sql
}

/// All values again as changes: new rows, new values, new keys, rows that go.
const CHANGED_VALUES: &str = "BEGIN;
    INSERT INTO public.\"values\" SELECT 'new ' || k, t, s, a, j FROM public.\"values\";
    UPDATE public.\"values\" SET t = t || '\\N' || t, s = s || '\\x00'::bytea || s, a = a || t WHERE k NOT LIKE 'new %';
    UPDATE public.\"values\" SET k = k || E'\\\\.\\n' || t WHERE k LIKE 'U+%' AND length(t) > 0;
    DELETE FROM public.\"values\" WHERE k LIKE 'new %' AND hashtext(k) % 2 = 0;
    COMMIT;
    BEGIN;
    INSERT INTO public.bytes SELECT b || b || '\\x0a0b'::bytea, \"char\", v, c FROM public.bytes;
    UPDATE public.bytes SET b = '\\x00'::bytea || b || '\\x00'::bytea WHERE length(b) = 3;
    UPDATE public.bytes SET v = E'\\\\.', c = '' WHERE length(b) = 1;
    DELETE FROM public.bytes WHERE b = '\\x5c'::bytea;
    COMMIT;
    -- One unique value swapped, so that this goes row by row.
    BEGIN; UPDATE public.\"values\" SET k = 'swap' WHERE k = E'\\\\N'; UPDATE public.\"values\" SET k = E'\\\\N' WHERE k = E'\\\\.';
    UPDATE public.\"values\" SET k = E'\\\\.' WHERE k = 'swap'; COMMIT;";

async fn fill(client: &Client, more: &str) {
    for of in 0..NAMES.len() {
        let sql = schema(of);
        client.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
    }
    client.batch_execute(&values()).await.unwrap();
    client.batch_execute(more).await.unwrap();
}

async fn migrate(migration: &Migration, in_binary: bool) {
    let source = migration.source().await;
    let mut running = migration.migrate(&[]);
    migration.wait_for_phase(&mut running, "following").await;
    let binary = migration.ledger("SELECT binary_format FROM walferry.migration").await[0].get::<_, bool>(0);
    assert_eq!(binary, in_binary);
    for round in 0..3 {
        for of in 0..NAMES.len() {
            let sql = changes(of, round);
            source.batch_execute(&sql).await.unwrap_or_else(|error| panic!("{error:?}\n{sql}"));
        }
    }
    source.batch_execute(CHANGED_VALUES).await.unwrap();
    source.batch_execute("TRUNCATE public.\"Truncated \"\"one\"").await.unwrap();
    let ready = |status: &serde_json::Value| status["ready_to_cutover"] == true;
    migration.wait_for_status(&mut running, "ready_to_cutover", ready).await;
    let shown = migration.with_directory("status", &[]).await;
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    migration.cut_over(running).await;
    migration.assert_equal().await;
    let own_verify = migration.with_directory("verify", &["--json"]).await;
    assert_eq!(own_verify.code, Some(0), "{}\n{}", own_verify.stderr, own_verify.stdout);
    let cleaned = migration.with_directory("clean", &[]).await;
    assert_eq!(cleaned.code, Some(0), "{}", cleaned.stderr);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_name_and_every_value_arrives_by_copy_and_by_stream_in_text_and_in_binary() {
    let settings = [("max_locks_per_transaction", "1000")];
    let servers = Servers::with(&settings, &settings).await;
    let (mut text, mut binary) = (servers.migration(IN_TEXT).await, servers.migration(IN_BINARY).await);
    text.state = "state — שלום 🦀 'q' \"d\" $HOME `id` %s \\ \n of two lines; -x".to_owned();
    binary.state = "-state".to_owned();
    let truncated = "CREATE TABLE public.\"Truncated \"\"one\" (k int PRIMARY KEY); INSERT INTO public.\"Truncated \"\"one\" VALUES (1);";
    fill(&binary.source().await, truncated).await;
    // One type whose binary form is not the same everywhere makes all go in text.
    fill(
        &text.source().await,
        &format!("{truncated} CREATE TABLE public.m (id int PRIMARY KEY, m money); INSERT INTO public.m VALUES (1, 2)"),
    )
    .await;
    for (migration, in_binary) in [(&text, false), (&binary, true)] {
        let check = migration.with_servers("check", &["--queue-max-bytes", "1GiB"]).await;
        assert_eq!(check.code, Some(0), "{}\n{}", check.stdout, check.stderr);
        migrate(migration, in_binary).await;
    }
}
