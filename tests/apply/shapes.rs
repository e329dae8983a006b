//! Random histories over every shape of table: what is applied in batches must be what the source has.

use std::fmt::Write;

use super::bed::Bed;

/// Tables of every shape that changes how a row is found, written or routed.
pub const SCHEMA: &str = r#"
CREATE SCHEMA ext;
CREATE EXTENSION citext SCHEMA ext;
CREATE EXTENSION hstore SCHEMA ext;
CREATE TYPE mood AS ENUM ('sad', 'ok', 'a "happy", \ one');
CREATE TYPE pair AS (x int, y text);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN email AS ext.citext CHECK (VALUE <> '');
CREATE COLLATION nocase (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TABLE plain (id int PRIMARY KEY, a text, n int);
CREATE TABLE toast (id int PRIMARY KEY, n int, big text, other text);
ALTER TABLE toast ALTER big SET STORAGE EXTERNAL, ALTER other SET STORAGE EXTERNAL;
CREATE TABLE toastkey (k text PRIMARY KEY, n int);
ALTER TABLE toastkey ALTER k SET STORAGE EXTERNAL;
CREATE TABLE uniq (id int PRIMARY KEY, u int UNIQUE, a text);
CREATE TABLE later (id int PRIMARY KEY, u int UNIQUE DEFERRABLE INITIALLY DEFERRED, a text);
CREATE TABLE excluded (id int PRIMARY KEY, r int4range, EXCLUDE USING gist (r WITH &&));
CREATE TABLE numerickey (k numeric PRIMARY KEY, n int);
CREATE TABLE floatkey (k float8 PRIMARY KEY, n int);
CREATE TABLE citextkey (k ext.citext PRIMARY KEY, n int);
CREATE TABLE nocasekey (k text COLLATE nocase PRIMARY KEY, n int);
CREATE TABLE domainkey (p positive, e email, n positive, PRIMARY KEY (e, p));
CREATE TABLE enumkey (m mood, d date, n int, PRIMARY KEY (d, m));
CREATE TABLE arraykey (k int[] PRIMARY KEY, c pair, cs pair[], h ext.hstore, m mood[]);
CREATE TABLE cidrkey (k cidr PRIMARY KEY, r regclass);
CREATE TABLE values_of (id bigint PRIMARY KEY, b bytea, t text, j json, jb jsonb, x xml, iv interval, ts timestamptz,
                        f float4, ch char(5), vc varchar(7), bt bit(3), nu numeric(9,2), mo money, na name, c "char", ip inet);
CREATE TABLE generated (g int GENERATED ALWAYS AS (n * 2) STORED, id int PRIMARY KEY, n int, h text GENERATED ALWAYS AS (a || '!') STORED, a text);
CREATE TABLE identity (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, a text);
CREATE TABLE keyless (a int, b text);
CREATE TABLE full_keyless (a int, b text, j json);
ALTER TABLE full_keyless REPLICA IDENTITY FULL;
CREATE TABLE full_key (id int PRIMARY KEY, a text, big text);
ALTER TABLE full_key REPLICA IDENTITY FULL, ALTER big SET STORAGE EXTERNAL;
CREATE TABLE by_index (a int, b varchar(30) NOT NULL, c int NOT NULL, n int);
CREATE UNIQUE INDEX by_index_key ON by_index (c, b) INCLUDE (n);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_key;
CREATE TABLE parts (id int, region text, n int, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE parts_r0 PARTITION OF parts FOR VALUES IN ('r0');
CREATE TABLE parts_r1 (n int, gone int, region text NOT NULL, id int NOT NULL);
ALTER TABLE parts_r1 DROP gone;
ALTER TABLE parts ATTACH PARTITION parts_r1 FOR VALUES IN ('r1');
CREATE TABLE parts_rest PARTITION OF parts DEFAULT;
CREATE TABLE parent (id int PRIMARY KEY, a text);
CREATE TABLE child (extra int, PRIMARY KEY (id)) INHERITS (parent);
CREATE TABLE dropped (a int, gone text, id int PRIMARY KEY, gone2 int, b text);
ALTER TABLE dropped DROP gone, DROP gone2, ADD c int DEFAULT 7;
CREATE TABLE nothing_in_it ();
CREATE TABLE "We""ird \ Täble" ("Kéy 'x'" int PRIMARY KEY, "select" text, "a
b" int);
CREATE TABLE manykey (a uuid, b timestamptz, c "char", d boolean, n int, PRIMARY KEY (d, a, b));
DO $$ BEGIN EXECUTE 'CREATE TABLE wide (id int PRIMARY KEY, ' || (SELECT string_agg('c' || g || ' int', ', ') FROM generate_series(1, 1599) g) || ')'; END $$;
"#;

/// Of each table, statements that change some rows around {a} (0 to 29); {b} is another such number, {x} a fresh one.
pub const CHANGES: &[(&str, &[&str])] = &[
    (
        "plain",
        &[
            "INSERT INTO plain SELECT g, 'v{x}', {x} FROM generate_series({a}, {a} + 9) g ON CONFLICT DO NOTHING",
            "UPDATE plain SET a = E'\\b\\f\\v\\\\N\\t\\r\\n\\\\.{x}' WHERE id BETWEEN {a} AND {a} + 6",
            "UPDATE plain SET id = id + 40, a = NULL WHERE id = {a}",
            "UPDATE plain SET id = id - 40 WHERE id = {b} + 40",
            "DELETE FROM plain WHERE id BETWEEN {b} AND {b} + 2",
        ],
    ),
    (
        "toast",
        &[
            "INSERT INTO toast SELECT g, {x}, repeat('b{x}', 900), repeat('o', 3000) FROM generate_series({a}, {a} + 4) g ON CONFLICT DO NOTHING",
            "UPDATE toast SET n = {x} WHERE id BETWEEN {a} AND {a} + 8",
            "UPDATE toast SET big = repeat('c{x}', 800) WHERE id = {a}",
            "UPDATE toast SET other = NULL, n = n + 1 WHERE id = {b}",
            "UPDATE toast SET id = id + 50, big = repeat('d{x}', 700), other = 'x' WHERE id = {a}",
            "DELETE FROM toast WHERE id = {b}",
        ],
    ),
    (
        "toastkey",
        &[
            "INSERT INTO toastkey SELECT repeat(chr(65 + g % 20), 2400) || g, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE toastkey SET n = {x} WHERE k LIKE '%{a}'",
            "UPDATE toastkey SET k = k || 'k' WHERE k LIKE '%{b}'",
            "DELETE FROM toastkey WHERE k LIKE '%{b}'",
        ],
    ),
    (
        "uniq",
        &[
            "INSERT INTO uniq SELECT g, g * 2, 'u{x}' FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE uniq SET u = NULL WHERE id = {a}",
            "UPDATE uniq SET u = {b}, a = 'w{x}' WHERE id = {a}",
            "DELETE FROM uniq WHERE id = {b}",
        ],
    ),
    (
        "later",
        &[
            "INSERT INTO later SELECT g, g, 'l{x}' FROM generate_series({a}, {a} + 5) g ON CONFLICT (id) DO NOTHING",
            "UPDATE later SET u = CASE id WHEN {a} THEN (SELECT u FROM later WHERE id = {b}) ELSE (SELECT u FROM later WHERE id = {a}) END WHERE id IN ({a}, {b}) AND 2 = (SELECT count(*) FROM later WHERE id IN ({a}, {b}))",
            "DELETE FROM later WHERE id = {b}",
        ],
    ),
    (
        "excluded",
        &[
            "INSERT INTO excluded SELECT g, int4range(g * 10, g * 10 + 9) FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE excluded SET r = int4range({b} * 10 + 1, {b} * 10 + 5) WHERE id = {b}",
            "UPDATE excluded SET r = 'empty' WHERE id = {a}",
            "DELETE FROM excluded WHERE id = {b}",
        ],
    ),
    (
        "numerickey",
        &[
            "INSERT INTO numerickey SELECT g + 0.0, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE numerickey SET k = k + 0.00 WHERE k = {a}",
            "UPDATE numerickey SET n = {x} WHERE k BETWEEN {a} AND {a} + 3",
            "UPDATE numerickey SET k = trim_scale(k) WHERE k = {b}",
            "DELETE FROM numerickey WHERE k = {b}",
            "INSERT INTO numerickey VALUES ('NaN', {x}) ON CONFLICT (k) DO UPDATE SET n = {x}",
        ],
    ),
    (
        "floatkey",
        &[
            "INSERT INTO floatkey VALUES ('-0', {x}), ('Infinity', {x}), ({a} / 7.0, 1) ON CONFLICT DO NOTHING",
            "UPDATE floatkey SET k = '0' WHERE k = 0",
            "UPDATE floatkey SET k = '-0', n = {x} WHERE k = 0",
            "DELETE FROM floatkey WHERE k = 0",
            "DELETE FROM floatkey WHERE k = {b} / 7.0",
        ],
    ),
    (
        "citextkey",
        &[
            "INSERT INTO citextkey SELECT 'key' || g, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE citextkey SET k = upper(k::text) WHERE k = 'key{a}'",
            "UPDATE citextkey SET k = lower(k::text), n = {x} WHERE k = 'key{b}'",
            "DELETE FROM citextkey WHERE k = 'KEY{b}'",
        ],
    ),
    (
        "nocasekey",
        &[
            "INSERT INTO nocasekey SELECT 'key' || g, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE nocasekey SET k = upper(k) WHERE k = 'key{a}'",
            "UPDATE nocasekey SET n = {x} WHERE k = 'KEY{b}'",
            "DELETE FROM nocasekey WHERE k = 'KEY{b}'",
        ],
    ),
    (
        "domainkey",
        &[
            "INSERT INTO domainkey SELECT g + 1, 'a' || g, {x} + 1 FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE domainkey SET e = upper(e::text) WHERE p = {a} + 1",
            "UPDATE domainkey SET p = p + 31 WHERE p = {b} + 1",
            "DELETE FROM domainkey WHERE p = {b} + 1",
        ],
    ),
    (
        "enumkey",
        &[
            "INSERT INTO enumkey SELECT m, date '2026-01-01' + {a}, {x} FROM unnest(enum_range(NULL::mood)) m ON CONFLICT DO NOTHING",
            "UPDATE enumkey SET d = d + 100 WHERE d = date '2026-01-01' + {b} AND m = 'ok'",
            "UPDATE enumkey SET n = {x} WHERE d = date '2026-01-01' + {a}",
            "DELETE FROM enumkey WHERE d = date '2026-01-01' + {b}",
        ],
    ),
    (
        "arraykey",
        &[
            r#"INSERT INTO arraykey SELECT array[g, {a}], row(g, 'q"\ {x}')::pair, array[row(1, NULL)::pair, NULL], ext.hstore('a=>b', E'c\n'), array['ok', NULL]::mood[] FROM generate_series({a}, {a} + 4) g ON CONFLICT DO NOTHING"#,
            "UPDATE arraykey SET c = row({x}, NULL), h = NULL WHERE k[1] = {a}",
            "UPDATE arraykey SET k = k || {x} WHERE k[1] = {b}",
            "DELETE FROM arraykey WHERE k[1] = {b}",
        ],
    ),
    (
        "cidrkey",
        &[
            "INSERT INTO cidrkey VALUES ('10.{a}.0.0/16', 'pg_class') ON CONFLICT DO NOTHING",
            "UPDATE cidrkey SET r = 'pg_type' WHERE k = '10.{a}.0.0/16'",
            "UPDATE cidrkey SET k = '11.{b}.0.0/16' WHERE k = '10.{b}.0.0/16'",
            "DELETE FROM cidrkey WHERE k = '10.{b}.0.0/16'",
        ],
    ),
    (
        "values_of",
        &[
            r#"INSERT INTO values_of SELECT g, decode(string_agg(lpad(to_hex(h), 2, '0'), ''), 'hex'), (SELECT string_agg(chr(i), '') FROM generate_series(1, 255) i),
             '{"a": [1, "\\u00e9"] }', '{"b": {"c": null}}', '<a>&amp;</a>', '1 year -2 days 03:04:05.6', '2026-02-03 04:05:06.789+00', 'NaN',
             'ab', E'\\\\.', B'101', 12.50, 12.5, 'näme', E'\\t', '::1/64' FROM generate_series({a}, {a} + 3) g, generate_series(0, 255) h GROUP BY g ON CONFLICT DO NOTHING"#,
            "UPDATE values_of SET b = '', t = '', j = 'null', jb = NULL, x = NULL, iv = '-1 mon', ts = '-infinity', f = '-0', ch = '', vc = NULL, bt = NULL, nu = 'NaN', mo = -1.5, na = '', c = 'x' WHERE id = {a}",
            "UPDATE values_of SET id = id + 100000000000 WHERE id = {b}",
            "DELETE FROM values_of WHERE id = {b}",
        ],
    ),
    (
        "generated",
        &[
            "INSERT INTO generated (id, n, a) SELECT g, {x}, 'g' FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE generated SET n = {x}, a = NULL WHERE id BETWEEN {a} AND {a} + 3",
            "UPDATE generated SET id = id + 60 WHERE id = {b}",
            "DELETE FROM generated WHERE id = {b}",
        ],
    ),
    (
        "identity",
        &[
            "INSERT INTO identity (a) SELECT 'i{x}' FROM generate_series(1, 3)",
            "UPDATE identity SET a = 'j{x}' WHERE id % 30 = {a}",
            "DELETE FROM identity WHERE id % 30 = {b}",
        ],
    ),
    ("keyless", &["INSERT INTO keyless SELECT {a}, 'same' FROM generate_series(1, 4)"]),
    (
        "full_keyless",
        &[
            r#"INSERT INTO full_keyless SELECT {a}, NULL, '{"a":  {b}}' FROM generate_series(1, 3)"#,
            "UPDATE full_keyless SET b = 'f{x}' WHERE ctid = (SELECT ctid FROM full_keyless WHERE a = {a} LIMIT 1)",
            "DELETE FROM full_keyless WHERE ctid = (SELECT ctid FROM full_keyless WHERE a = {b} LIMIT 1)",
        ],
    ),
    (
        "full_key",
        &[
            "INSERT INTO full_key SELECT g, 'f', repeat('y{x}', 900) FROM generate_series({a}, {a} + 4) g ON CONFLICT DO NOTHING",
            "UPDATE full_key SET a = 'g{x}' WHERE id BETWEEN {a} AND {a} + 3",
            "UPDATE full_key SET id = id + 70 WHERE id = {b}",
            "DELETE FROM full_key WHERE id = {b}",
        ],
    ),
    (
        "by_index",
        &[
            "INSERT INTO by_index SELECT {x}, 'b' || g, g, 1 FROM generate_series({a}, {a} + 4) g ON CONFLICT DO NOTHING",
            "UPDATE by_index SET n = {x}, a = NULL WHERE c BETWEEN {a} AND {a} + 3",
            "UPDATE by_index SET b = 'z' || c WHERE c = {b}",
            "DELETE FROM by_index WHERE c = {b}",
        ],
    ),
    (
        "parts",
        &[
            "INSERT INTO parts SELECT g, 'r' || {b} % 3, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE parts SET region = 'r1' WHERE id = {a} AND region = 'r0' AND NOT EXISTS (SELECT FROM parts WHERE id = {a} AND region = 'r1')",
            "UPDATE parts SET region = 'r2' WHERE id = {b} AND region = 'r1' AND NOT EXISTS (SELECT FROM parts WHERE id = {b} AND region = 'r2')",
            "UPDATE parts SET n = {x} WHERE id BETWEEN {a} AND {a} + 3",
            "DELETE FROM parts WHERE id = {b}",
        ],
    ),
    (
        "parent",
        &[
            "INSERT INTO parent SELECT g, 'p' FROM generate_series({a}, {a} + 3) g ON CONFLICT DO NOTHING",
            "INSERT INTO child SELECT g, 'c', {x} FROM generate_series({b}, {b} + 3) g ON CONFLICT DO NOTHING",
            "UPDATE parent SET a = 'q{x}' WHERE id = {a}",
            "DELETE FROM parent WHERE id = {b}",
        ],
    ),
    (
        "dropped",
        &[
            "INSERT INTO dropped SELECT {x}, g, 'd' FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE dropped SET b = NULL, c = {x} WHERE id BETWEEN {a} AND {a} + 3",
            "DELETE FROM dropped WHERE id = {b}",
        ],
    ),
    ("nothing_in_it", &["INSERT INTO nothing_in_it DEFAULT VALUES"]),
    (
        r#"We"ird \ Täble"#,
        &[
            r#"INSERT INTO "We""ird \ Täble" SELECT g, 'w{x}', 1 FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING"#,
            "UPDATE \"We\"\"ird \\ Täble\" SET \"a\nb\" = {x} WHERE \"Kéy 'x'\" BETWEEN {a} AND {a} + 3",
            r#"DELETE FROM "We""ird \ Täble" WHERE "Kéy 'x'" = {b}"#,
        ],
    ),
    (
        "manykey",
        &[
            "INSERT INTO manykey SELECT md5(g::text)::uuid, timestamptz '2026-01-01 00:00:00+00' + g * interval '1 us', 'c', g % 2 = 0, {x} FROM generate_series({a}, {a} + 5) g ON CONFLICT DO NOTHING",
            "UPDATE manykey SET n = {x} WHERE a = md5('{a}')::uuid",
            "UPDATE manykey SET d = NOT d WHERE a = md5('{b}')::uuid",
            "DELETE FROM manykey WHERE a = md5('{b}')::uuid",
        ],
    ),
    (
        "wide",
        &[
            "INSERT INTO wide (id, c1, c1599) SELECT g, 1, {x} FROM generate_series({a}, {a} + 3) g ON CONFLICT DO NOTHING",
            "UPDATE wide SET c800 = {x}, c1 = NULL WHERE id BETWEEN {a} AND {a} + 3",
            "UPDATE wide SET id = id + 80 WHERE id = {b}",
            "DELETE FROM wide WHERE id = {b}",
        ],
    ),
];

/// Small numbers that depend on nothing but the seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

/// A transaction over some tables, as a script; what the source refuses of it, it refuses as a whole.
fn transaction(random: &mut Random, changes: &[&(&str, &[&str])], fresh: &mut u64) -> String {
    let mut script = "BEGIN;".to_owned();
    for _ in 0..=random.below(4) {
        let (_, templates) = changes[random.below(changes.len() as u64) as usize];
        let template = templates[random.below(templates.len() as u64) as usize];
        *fresh += 1;
        let statement = template
            .replace("{a}", &random.below(30).to_string())
            .replace("{b}", &random.below(30).to_string())
            .replace("{x}", &fresh.to_string());
        let _ = write!(script, "{statement};");
    }
    script + "COMMIT"
}

/// Histories of one table after the other, then of all together, in small batches and in large ones.
pub async fn random_histories(binary: bool, workers: usize) {
    let server = super::bed::shared_server().await;
    let mut bed = Bed::with(
        server,
        SCHEMA,
        "INSERT INTO plain SELECT g, 'begin', g FROM generate_series(1, 20) g",
        workers,
        binary,
    )
    .await;
    let mut random = Random::new(workers as u64 + 10 * u64::from(binary));
    let mut fresh = 0;
    let there: Vec<&(&str, &[&str])> = CHANGES
        .iter()
        .filter(|(name, _)| {
            let leaf = if *name == "parts" { "parts_r0" } else { name };
            bed.tables.iter().any(|table| table.name == leaf)
        })
        .collect();
    assert!(there.len() > if binary { 12 } else { 27 }, "only {} tables", there.len());
    let mut committed = 0;
    for round in 0..there.len() + 3 {
        let changes = if round < there.len() { &there[round..=round] } else { &there[..] };
        let name = if round < there.len() { there[round].0 } else { "all of them" };
        for (batch, transactions) in [4, 60, 1].into_iter().enumerate() {
            for _ in 0..transactions {
                let script = transaction(&mut random, changes, &mut fresh);
                match bed.source.batch_execute(&script).await {
                    Ok(()) => committed += 1,
                    Err(error) => {
                        let state = error.code().unwrap_or_else(|| panic!("{script}: {error}")).code();
                        // A value that is taken: the application's transaction fails, and is no part of the history.
                        assert!(matches!(state, "23505" | "23P01"), "{script}: {error:?}");
                        bed.source.batch_execute("ROLLBACK").await.unwrap();
                    }
                }
            }
            // Both ways for every table: the ends of one history begin the next.
            let singly = [usize::MAX, 0, 3][(round + batch) % 3];
            bed.write_singly_up_to(singly);
            let when = format!("{name}, batch {batch}, binary {binary}, {workers} workers, up to {singly} rows singly");
            bed.capture_and_apply().await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
            if batch > 0 {
                bed.assert_equal(&when).await;
            }
        }
    }
    assert!(committed > 1000, "only {committed} transactions");
    let batches = bed.board.snapshot().apply.batches;
    assert!(bed.serial_replays() < batches / 2, "{} of {batches} went the serial way", bed.serial_replays());
}
