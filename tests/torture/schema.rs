//! A random schema: tables of every kind whose changes are hard to carry over.

use super::random::Random;

/// How a key column's value follows from a number, so that writers meet the same rows again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KeyKind {
    Int,
    BigInt,
    Uuid,
    Text,
    /// The same number with more or fewer zeros behind the point: one key to the index, two to a hash (H20).
    Numeric,
    /// 0 and -0 are one key.
    Float,
    /// A collation under which upper and lower case are one key.
    CaseInsensitive,
    /// The two halves of a composite key.
    High,
    Low,
}

impl KeyKind {
    fn sql_type(self) -> &'static str {
        match self {
            KeyKind::Int | KeyKind::High => "int",
            KeyKind::BigInt => "bigint",
            KeyKind::Uuid => "uuid",
            KeyKind::Text | KeyKind::Low => "text",
            KeyKind::Numeric => "numeric",
            KeyKind::Float => "float8",
            KeyKind::CaseInsensitive => "text COLLATE case_insensitive",
        }
    }

    /// The value for `number` (a literal, or the name of a column with one); `variant` chooses between equal values.
    pub fn value(self, number: &str, variant: u64) -> String {
        match self {
            KeyKind::Int => format!("({number})::int"),
            KeyKind::BigInt => format!("(({number})::bigint * 1000003)"),
            KeyKind::Uuid => format!("md5(({number})::text)::uuid"),
            KeyKind::Text => format!("(E'ключ \\\\ \\'\"\\n' || ({number})::text)"),
            KeyKind::Numeric => format!("(({number})::text || '.{}')::numeric", "0".repeat(1 + (variant % 3) as usize)),
            KeyKind::Float => {
                let zero = if variant.is_multiple_of(2) { "-0" } else { "0" };
                format!("(CASE WHEN ({number}) = 0 THEN '{zero}'::float8 ELSE ({number})::float8 / 3 END)")
            }
            KeyKind::CaseInsensitive => {
                format!("('{}' || ({number})::text)", ["key", "KEY", "Key"][(variant % 3) as usize])
            }
            KeyKind::High => format!("(({number}) / 97)::int"),
            KeyKind::Low => format!("('p' || (({number}) % 97)::text)"),
        }
    }
}

/// What is in a column that is no key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ValueKind {
    Int,
    Text,
    Numeric,
    Bool,
    Timestamp,
    Bytes,
    Float,
    Uuid,
    Date,
    Interval,
    /// Stored out of line, and left out of the stream where an update does not touch it.
    Wide,
    Jsonb,
    /// A type without an equality operator.
    Json,
    Point,
    IntArray,
    TextArray,
    Enum,
    Domain,
    Composite,
    Range,
    Inet,
    Char,
    Bits,
}

/// Kinds whose binary form walferry takes; the others decide for text.
const BINARY_KINDS: &[ValueKind] = &[
    ValueKind::Int,
    ValueKind::Text,
    ValueKind::Numeric,
    ValueKind::Bool,
    ValueKind::Timestamp,
    ValueKind::Bytes,
    ValueKind::Float,
    ValueKind::Uuid,
    ValueKind::Date,
    ValueKind::Interval,
    ValueKind::Wide,
    ValueKind::Jsonb,
    ValueKind::Json,
    ValueKind::Point,
    ValueKind::Domain,
    ValueKind::Range,
    ValueKind::Inet,
    ValueKind::Char,
    ValueKind::Bits,
];
const TEXT_KINDS: &[ValueKind] =
    &[ValueKind::IntArray, ValueKind::TextArray, ValueKind::Enum, ValueKind::Composite, ValueKind::Wide];

impl ValueKind {
    fn sql_type(self) -> &'static str {
        match self {
            ValueKind::Int => "int",
            ValueKind::Text | ValueKind::Wide => "text",
            ValueKind::Numeric => "numeric",
            ValueKind::Bool => "bool",
            ValueKind::Timestamp => "timestamptz",
            ValueKind::Bytes => "bytea",
            ValueKind::Float => "float8",
            ValueKind::Uuid => "uuid",
            ValueKind::Date => "date",
            ValueKind::Interval => "interval",
            ValueKind::Jsonb => "jsonb",
            ValueKind::Json => "json",
            ValueKind::Point => "point",
            ValueKind::IntArray => "int[]",
            ValueKind::TextArray => "text[]",
            ValueKind::Enum => "\"Mood\"",
            ValueKind::Domain => "positive",
            ValueKind::Composite => "pair",
            ValueKind::Range => "int4range",
            ValueKind::Inet => "inet",
            ValueKind::Char => "char(12)",
            ValueKind::Bits => "bit varying(20)",
        }
    }

    /// A random value, or an expression over the column `number` with a random part.
    pub fn value(self, number: &str, random: &mut Random) -> String {
        let r = random.next() % 1_000_000;
        let n = format!("({number})");
        match self {
            ValueKind::Int => format!("((({n}::bigint * 31 + {r}) % 100000)::int)"),
            ValueKind::Text => {
                let text = random.pick(&[
                    "''",
                    "'plain'",
                    "E'tab\\there'",
                    "E'line\\nbreak\\r\\n'",
                    "E'back\\\\slash \\\\N \\\\.'",
                    "'quote''s \"double\"'",
                    "'Grüße 👋 漢字'",
                    "'NULL'",
                    "' leading and trailing '",
                    "E'\\x01\\x7f'",
                ]);
                if random.chance(30) { (*text).to_owned() } else { format!("({text} || {n}::text || '{r}')") }
            }
            ValueKind::Numeric => match r % 12 {
                0 => "'NaN'::numeric".into(),
                1 => "'-0.000'::numeric".into(),
                2 => "'Infinity'::numeric".into(),
                _ => format!("(({n}::numeric * {r} / 1000)::numeric({}, 3))", 30),
            },
            ValueKind::Bool => format!("({n} % 2 = {})", r % 2),
            ValueKind::Timestamp => match r % 12 {
                0 => "'infinity'::timestamptz".into(),
                1 => "'0044-03-15 12:00:00 BC'::timestamptz".into(),
                _ => format!("('2020-02-29 00:00:00Z'::timestamptz + {n} * interval '1.000001 s' * {})", r % 999),
            },
            ValueKind::Bytes => format!("decode(md5(({n} + {r})::text) || '00ff5c', 'hex')"),
            ValueKind::Float => match r % 10 {
                0 => "'NaN'::float8".into(),
                1 => "'-0'::float8".into(),
                2 => "'-Infinity'::float8".into(),
                _ => format!("sqrt(abs({n}::float8 * {r}))"),
            },
            ValueKind::Uuid => format!("md5(({n} * 7 + {r})::text)::uuid"),
            ValueKind::Date => format!("('1999-12-31'::date + ({n} % 10000)::int + {})", r % 1000),
            ValueKind::Interval => format!("({n} % 1000 * interval '1 day 03:04:05.6' - interval '{} months')", r % 99),
            ValueKind::Wide => format!("repeat(md5(({n} + {r})::text), {})", 80 + r % 200),
            ValueKind::Jsonb => format!("jsonb_build_object('n', {n}, 'r', {r}, 'text', E'a\"b\\\\c', 'null', NULL)"),
            ValueKind::Json => format!("(('{{\"b\": ' || {n} || ',   \"a\": [{r}]}}')::json)"),
            ValueKind::Point => format!("point({n}, {r})"),
            ValueKind::IntArray => format!("ARRAY[{n}, NULL, {r}]::int[]"),
            ValueKind::TextArray => format!("ARRAY[{n}::text, '{r}', 'a,b', '{{}}', NULL, '']"),
            ValueKind::Enum => format!("(('{{happy,\"so so\",Ärger}}'::\"Mood\"[])[1 + (({n} + {r}) % 3)::int])"),
            ValueKind::Domain => format!("((1 + ({n} + {r}) % 1000)::positive)"),
            ValueKind::Composite => format!("ROW({n}, 'c,{r}')::pair"),
            ValueKind::Range => format!("int4range(({n} % 1000)::int, ({n} % 1000)::int + {})", r % 50),
            ValueKind::Inet => format!("('10.0.0.0'::inet + ({n} % 65536)::bigint + {})", r % 100),
            ValueKind::Char => format!("('c' || ({n} % 1000)::text)"),
            ValueKind::Bits => format!("(({n} % 1000)::int::bit(10)::varbit)"),
        }
    }
}

/// Tables with an int key that others can reference.
const PARENTS: &[&str] = &["public.plain", "public.seats", "public.watched"];

/// A column, with its name quoted.
#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    pub kind: ValueKind,
    pub nullable: bool,
}

/// What is special about a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trait {
    Plain,
    /// `GENERATED ALWAYS AS IDENTITY`.
    Identity,
    /// No key at all: the stream carries its inserts and truncates only.
    InsertOnly,
    /// No key, REPLICA IDENTITY FULL, and rows that are equal in everything.
    Duplicates,
    /// REPLICA IDENTITY USING INDEX beside a primary key.
    ByIndex,
    /// A second unique column, `u`.
    SecondUnique,
    /// The same, checked at commit.
    DeferrableUnique,
    /// By ranges of a key column, so that a key change moves the row.
    Partitioned,
    /// References another table.
    Child,
    /// The key is all there is.
    KeyOnly,
    /// A trigger writes into a log table.
    Logged,
    /// A stored generated column.
    Generated,
    /// Inherits from another table: what is written to that one by its name is written here too.
    Heir,
}

/// A table.
#[derive(Clone, Debug)]
pub struct Table {
    /// Quoted, with its schema.
    pub name: String,
    pub is: Trait,
    /// Quoted names and kinds; empty for tables without a key.
    pub key: Vec<(String, KeyKind)>,
    pub columns: Vec<Column>,
    /// Keys are made of the numbers from 0 to this.
    pub span: u64,
    pub initial_rows: u64,
    pub truncated_sometimes: bool,
    /// The table that the column `parent` references.
    pub parent: Option<String>,
    create: Vec<String>,
}

impl Table {
    /// The columns of an INSERT.
    pub fn insert_columns(&self) -> String {
        let keys = self.key.iter().map(|(name, _)| name.as_str());
        let mut names: Vec<&str> = keys.chain(self.columns.iter().map(|column| column.name.as_str())).collect();
        if self.has_unique() {
            names.push("u");
        }
        if self.parent.is_some() {
            names.push("parent");
        }
        names.join(", ")
    }

    /// The values of an INSERT for a number.
    pub fn values(&self, number: &str, random: &mut Random) -> String {
        let mut values: Vec<String> = self.key.iter().map(|(_, kind)| kind.value(number, random.next())).collect();
        for column in &self.columns {
            let null = column.nullable && random.chance(12);
            values.push(if null { "NULL".into() } else { column.kind.value(number, random) });
        }
        if self.has_unique() {
            values.push(format!("({number})::int"));
        }
        if let Some(parent) = &self.parent {
            values.push(format!("(SELECT p.\"Id\" FROM {parent} p WHERE p.\"Id\" = (({number}) % 500)::int)"));
        }
        values.join(", ")
    }

    pub fn has_unique(&self) -> bool {
        matches!(self.is, Trait::SecondUnique | Trait::DeferrableUnique)
    }

    /// The condition that finds the row of a number.
    pub fn where_key(&self, number: &str, random: &mut Random) -> String {
        let equal = |(name, kind): &(String, KeyKind)| format!("{name} = {}", kind.value(number, random.next()));
        self.key.iter().map(equal).collect::<Vec<_>>().join(" AND ")
    }

    /// `SET` for all of the key.
    pub fn set_key(&self, number: &str, random: &mut Random) -> String {
        let set = |(name, kind): &(String, KeyKind)| format!("{name} = {}", kind.value(number, random.next()));
        self.key.iter().map(set).collect::<Vec<_>>().join(", ")
    }
}

/// Everything of a database.
pub struct Schema {
    pub tables: Vec<Table>,
    pub sequences: Vec<String>,
    statements: Vec<String>,
}

impl Schema {
    pub fn random(random: &mut Random) -> Schema {
        let binary = random.chance(50);
        let mut kinds = BINARY_KINDS.to_vec();
        if !binary {
            kinds.extend_from_slice(TEXT_KINDS);
        }
        let mut maker = Maker { random, kinds, tables: Vec::new() };
        maker.make();
        let tables = maker.tables;
        let sequences = vec!["public.\"order Numbers\"".to_owned(), "\"Großer Laden\".tickets".to_owned()];
        let mut statements: Vec<String> = [
            "CREATE SCHEMA \"Großer Laden\"",
            "CREATE TYPE \"Mood\" AS ENUM ('happy', 'so so', 'Ärger')",
            "CREATE DOMAIN positive AS int CHECK (VALUE > 0)",
            "CREATE TYPE pair AS (a int, b text)",
            "CREATE COLLATION case_insensitive (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
            "CREATE SEQUENCE public.\"order Numbers\" INCREMENT BY 3",
            "CREATE SEQUENCE \"Großer Laden\".tickets AS int MINVALUE -100 CACHE 5 CYCLE",
            "CREATE TABLE public.log (at bigint GENERATED ALWAYS AS IDENTITY, what text, PRIMARY KEY (at))",
            "CREATE FUNCTION public.write_log() RETURNS trigger LANGUAGE plpgsql AS \
             'BEGIN INSERT INTO public.log (what) VALUES (TG_OP || TG_TABLE_NAME); RETURN NULL; END'",
        ]
        .map(str::to_owned)
        .to_vec();
        statements.extend(tables.iter().flat_map(|table| table.create.clone()));
        Schema { tables, sequences, statements }
    }

    /// The statements that make it, for the report of a failure and for the server.
    pub fn statements(&self) -> &[String] {
        &self.statements
    }

    /// The statements that fill it.
    pub fn fill(&self, random: &mut Random) -> Vec<String> {
        let mut statements = Vec::new();
        for table in self.tables.iter().filter(|table| table.initial_rows > 0) {
            let overriding = if table.is == Trait::Identity { "OVERRIDING SYSTEM VALUE " } else { "" };
            // In pieces, so that not every row has the same random part.
            let pieces = 4;
            for piece in 0..pieces {
                let (from, until) = (table.initial_rows * piece / pieces, table.initial_rows * (piece + 1) / pieces);
                statements.push(format!(
                    "INSERT INTO {} ({}) {overriding}SELECT {} FROM generate_series({from}, {until} - 1) g",
                    table.name,
                    table.insert_columns(),
                    table.values("g", random),
                ));
            }
        }
        statements
    }
}

struct Maker<'a> {
    random: &'a mut Random,
    kinds: Vec<ValueKind>,
    tables: Vec<Table>,
}

impl Maker<'_> {
    fn make(&mut self) {
        use KeyKind::{BigInt, CaseInsensitive, Float, High, Int, Low, Numeric, Text, Uuid};
        let all: &[(&str, &[KeyKind], Trait)] = &[
            ("public.plain", &[Int], Trait::Plain),
            ("\"Großer Laden\".\"Überweisung \"\"x\"\"\"", &[Uuid], Trait::Plain),
            ("public.\"select\"", &[Text], Trait::Plain),
            ("public.composite", &[High, Low], Trait::Plain),
            ("public.amounts", &[Numeric], Trait::Plain),
            ("public.measures", &[Float], Trait::Plain),
            ("public.names", &[CaseInsensitive], Trait::Plain),
            ("public.counted", &[BigInt], Trait::Identity),
            ("public.events", &[], Trait::InsertOnly),
            ("public.bag", &[], Trait::Duplicates),
            ("public.by_index", &[Uuid], Trait::ByIndex),
            ("public.seats", &[Int], Trait::SecondUnique),
            ("public.\"Ränge\"", &[BigInt], Trait::DeferrableUnique),
            ("public.measured", &[High, Low], Trait::Partitioned),
            ("\"Großer Laden\".pairs", &[Low, Int], Trait::KeyOnly),
            ("public.watched", &[Int], Trait::Logged),
            ("public.computed", &[Int], Trait::Generated),
        ];
        for (name, key, is) in all {
            // Every seed has most of them.
            if self.random.chance(70) || *is == Trait::Plain && self.tables.is_empty() {
                self.table(name, key, *is);
            }
        }
        if self.random.chance(60) {
            self.table("public.child", &[Int], Trait::Child);
        }
        if let Some(parent) = self.tables.iter().find(|table| table.name == "public.plain" && self.random.chance(60)) {
            let create =
                format!("CREATE TABLE public.heirs (extra text, PRIMARY KEY (\"Id\")) INHERITS ({})", parent.name);
            let heir = Table { name: "public.heirs".into(), is: Trait::Heir, create: vec![create], ..parent.clone() };
            self.tables.push(Table { span: 500, initial_rows: 300, ..heir });
        }
        // Large enough for several parts.
        let big = (self.random.next() % self.tables.len() as u64) as usize;
        for position in [0, big] {
            let table = &mut self.tables[position];
            table.span = 60_000;
            table.initial_rows = self.random.between(20_000, 50_000);
        }
    }

    fn table(&mut self, name: &str, key: &[KeyKind], is: Trait) {
        let key: Vec<(String, KeyKind)> =
            key.iter().enumerate().map(|(at, kind)| (["\"Id\"", "second"][at].to_owned(), *kind)).collect();
        let wanted = if is == Trait::KeyOnly { 0 } else { self.random.between(1, 6) };
        let mut columns: Vec<Column> = (0..wanted)
            .map(|at| Column {
                name: if at == 1 { "\"Spalte; --\"".into() } else { format!("c{at}") },
                kind: *self.random.pick(&self.kinds),
                nullable: self.random.chance(70),
            })
            .collect();
        if is == Trait::Duplicates {
            // Few values, so that rows are equal.
            columns = vec![
                Column { name: "a".into(), kind: ValueKind::Bool, nullable: true },
                Column { name: "b".into(), kind: ValueKind::Char, nullable: true },
            ];
            if self.random.chance(40) {
                columns.push(Column { name: "j".into(), kind: ValueKind::Json, nullable: true });
            }
            if self.random.chance(40) {
                columns.push(Column { name: "w".into(), kind: ValueKind::Wide, nullable: true });
            }
        }
        let identity = if is == Trait::Identity { " GENERATED ALWAYS AS IDENTITY" } else { "" };
        let mut definitions: Vec<String> =
            key.iter().map(|(name, kind)| format!("{name} {}{identity} NOT NULL", kind.sql_type())).collect();
        definitions.extend(columns.iter().map(|column| {
            let not_null = if column.nullable { "" } else { " NOT NULL" };
            format!("{} {}{not_null}", column.name, column.kind.sql_type())
        }));
        // The order of the key's columns in the index is not that of the table.
        let key_list = key.iter().rev().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
        match is {
            Trait::InsertOnly | Trait::Duplicates => {}
            Trait::ByIndex => {
                definitions.push("number bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY".into());
                definitions.push(format!("CONSTRAINT by_index_unique UNIQUE ({key_list})"));
            }
            _ => definitions.push(format!("PRIMARY KEY ({key_list})")),
        }
        let mut parent = None;
        match is {
            Trait::SecondUnique => definitions.push("u int UNIQUE".into()),
            Trait::DeferrableUnique => definitions.push("u int UNIQUE DEFERRABLE INITIALLY DEFERRED".into()),
            Trait::Generated => definitions.push("twice bigint GENERATED ALWAYS AS (\"Id\"::bigint * 2) STORED".into()),
            Trait::Child => {
                parent = self
                    .tables
                    .iter()
                    .find(|table| PARENTS.contains(&table.name.as_str()))
                    .map(|table| table.name.clone());
                let action = self.random.pick(&[
                    "ON DELETE CASCADE ON UPDATE CASCADE",
                    "ON DELETE SET NULL ON UPDATE CASCADE",
                    "DEFERRABLE INITIALLY DEFERRED",
                ]);
                definitions.extend(parent.iter().map(|parent| format!("parent int REFERENCES {parent} {action}")));
            }
            _ => {}
        }
        let partitioning = if is == Trait::Partitioned { " PARTITION BY RANGE (\"Id\")" } else { "" };
        let mut create = vec![format!("CREATE TABLE {name} ({}){partitioning}", definitions.join(", "))];
        if is == Trait::Partitioned {
            for (part, (from, until)) in [("MINVALUE", "7"), ("7", "20"), ("20", "35")].iter().enumerate() {
                create.push(format!(
                    "CREATE TABLE public.\"{part}. Teil\" PARTITION OF {name} FOR VALUES FROM ({from}) TO ({until})"
                ));
            }
            create.push(format!("CREATE TABLE public.rest PARTITION OF {name} DEFAULT"));
        }
        for column in columns.iter().filter(|column| column.kind == ValueKind::Wide) {
            create.push(format!("ALTER TABLE {name} ALTER {} SET STORAGE EXTERNAL", column.name));
        }
        match is {
            Trait::Duplicates => create.push(format!("ALTER TABLE {name} REPLICA IDENTITY FULL")),
            Trait::ByIndex => create.push(format!("ALTER TABLE {name} REPLICA IDENTITY USING INDEX by_index_unique")),
            Trait::Logged => create.push(format!(
                "CREATE TRIGGER log AFTER INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW EXECUTE FUNCTION public.write_log()"
            )),
            // A key does not forbid that the whole old row identifies.
            Trait::Plain if self.random.chance(15) => create.push(format!("ALTER TABLE {name} REPLICA IDENTITY FULL")),
            _ => {}
        }
        if self.random.chance(30)
            && !columns.is_empty()
            && !matches!(columns[0].kind, ValueKind::Json | ValueKind::Point | ValueKind::Wide)
        {
            create.push(format!("CREATE INDEX ON {name} ({})", columns[0].name));
        }
        let span = self.random.between(200, 4000);
        self.tables.push(Table {
            name: name.to_owned(),
            is,
            key,
            columns,
            span,
            initial_rows: if self.random.chance(15) { 0 } else { span / 2 },
            truncated_sometimes: self.random.chance(25) && !PARENTS.contains(&name),
            parent,
            create,
        });
    }
}
