//! The SQL by which a server turns rows into hashes that mean the same on the other server.
//!
//! A row becomes one text: `format('%L,%L,…', …)`. `%L` calls the output function of the type, never a cast (the cast of
//! `character(n)` to text strips blanks, that of `inet` adds a mask), and quotes the result, so that NULL, `'NULL'` and
//! `''` differ and no value can reach into its neighbour. The text is hashed to 128 bits, and the hashes are added up: addition, unlike
//! XOR, also counts rows that are there twice.
//!
//! The hash is `hashtextextended` with two seeds where both servers have one encoding and agree on a probe: a million
//! pgbench rows take 0.6 s in one backend, against 2.0 s for md5 or sha256. PostgreSQL promises
//! neither its value between versions nor between byte orders, hence the probe. Where the probe or the encodings differ, it is sha256
//! over the text in UTF-8; md5 where one side is PostgreSQL 10.
//!
//! Before PostgreSQL 12 a float prints with more digits than from then on. Between such servers the bits of floats are
//! compared, of columns of float types, arrays of them and geometric types; floats inside of other values (composite types) differ.

use tokio_postgres::Client;

use super::layout::{Shared, SharedColumn};
use crate::error::{Context, Result};
use crate::source::version::Version;
use crate::sql;

/// The first with `hashtextextended` and `sha256`.
const VERSION_WITH_HASHES: Version = Version(11);

/// Arguments a variadic function takes at most is 100 (`FUNC_MAX_ARGS`); wider rows are put together from groups.
const COLUMNS_PER_GROUP: usize = 90;

/// Bytes of a bytea that are shown.
const BYTES_SHOWN: usize = 100;

/// Texts that exercise the hash's branches: empty, shorter than a word, unaligned, longer than a block of 12 bytes.
const PROBE: &str = "SELECT pg_catalog.current_setting('server_encoding'), pg_catalog.array_agg( \
     pg_catalog.hashtextextended(pg_catalog.repeat('walferry', n) || pg_catalog.repeat('x', n) COLLATE \"C\", n)) \
     FROM pg_catalog.generate_series(0, 40) n";

/// Which hash both servers compute alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HashFunction {
    /// `hashtextextended`, twice.
    Fast,
    /// sha256 over the text in this encoding.
    Portable(&'static str),
    /// md5 over the text in this encoding: PostgreSQL 10 has nothing else.
    Old(&'static str),
}

/// Asks both servers, and chooses.
pub(super) async fn agree(source: &Client, target: &Client) -> Result<HashFunction> {
    let (source_version, target_version) = tokio::try_join!(Version::of(source), Version::of(target))?;
    if source_version.min(target_version) < VERSION_WITH_HASHES {
        let encoding = "SELECT pg_catalog.current_setting('server_encoding')";
        let (source, target) =
            tokio::try_join!(source.query_typed_one(encoding, &[]), target.query_typed_one(encoding, &[]))
                .context(|| "asking for the encodings".into())?;
        return Ok(HashFunction::Old(common_encoding(source.get(0), target.get(0))));
    }
    let ask = async |client: &Client, side: &str| -> Result<(String, Vec<i64>)> {
        let row =
            client.query_typed_one(PROBE, &[]).await.context(|| format!("probing the hash function of the {side}"))?;
        Ok((row.get(0), row.get(1)))
    };
    let ((source_encoding, source_probe), (target_encoding, target_probe)) =
        tokio::try_join!(ask(source, "source"), ask(target, "target"))?;
    Ok(choose(&source_encoding, &target_encoding, source_probe == target_probe))
}

fn choose(source_encoding: &str, target_encoding: &str, probes_agree: bool) -> HashFunction {
    if source_encoding == target_encoding && probes_agree {
        HashFunction::Fast
    } else {
        HashFunction::Portable(common_encoding(source_encoding, target_encoding))
    }
}

/// Nobody knows which characters an SQL_ASCII database holds: its bytes are compared as they are.
fn common_encoding(source: &str, target: &str) -> &'static str {
    if source == "SQL_ASCII" || target == "SQL_ASCII" { "SQL_ASCII" } else { "UTF8" }
}

impl HashFunction {
    /// What is computed once per row and then goes into [`HashFunction::half`].
    fn digest(self, text: &str) -> String {
        match self {
            HashFunction::Fast => format!("{text} COLLATE \"C\""),
            HashFunction::Portable(encoding) => format!(
                "pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to({text}, '{encoding}')), 'hex') COLLATE \"C\""
            ),
            HashFunction::Old(encoding) => {
                format!("pg_catalog.md5(pg_catalog.convert_to({text}, '{encoding}')) COLLATE \"C\"")
            }
        }
    }

    /// The first or second 64 bits of a digest, as int8.
    fn half(self, digest: &str, second: bool) -> String {
        match self {
            HashFunction::Fast => format!("pg_catalog.hashtextextended({digest}, {})", if second { 2 } else { 1 }),
            HashFunction::Portable(_) | HashFunction::Old(_) => {
                format!("('x' || pg_catalog.substr({digest}, {}, 16))::bit(64)::int8", if second { 17 } else { 1 })
            }
        }
    }
}

/// The statements over one table; the same for both sides but for what they read from.
pub(super) struct Statements {
    function: HashFunction,
    row: String,
    key: String,
    columns: Vec<String>,
    key_columns: Vec<String>,
    /// The columns as they are shown; of a bytea only its beginning.
    shown: Vec<String>,
}

/// Some cells of the hash of the key: those whose lowest `bits` bits are one of `cells`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cells {
    pub(super) bits: u32,
    pub(super) cells: Vec<i64>,
}

impl Statements {
    pub(super) fn new(function: HashFunction, shared: &Shared) -> Statements {
        let columns: Vec<String> = shared.columns.iter().map(|column| value(function, column)).collect();
        let key = |&at: &usize| {
            let column = &shared.columns[at];
            bits(column).unwrap_or_else(|| format!("t.{}", sql::identifier(&column.name)))
        };
        let key_columns: Vec<String> = shared.key.iter().map(key).collect();
        let row = text_of(&columns);
        let key = if key_columns.is_empty() { row.clone() } else { text_of(&key_columns) };
        let plain = |name: &str| format!("t.{}", sql::identifier(name));
        let shown = |column: &SharedColumn| match column.is_bytea {
            true => format!("pg_catalog.substr({}, 1, {BYTES_SHOWN})", plain(&column.name)),
            false => plain(&column.name),
        };
        let shown = shared.columns.iter().map(shown).collect();
        Statements { function, row, key, columns, key_columns, shown }
    }

    /// 64 bits of a hash of the key.
    fn key_hash(&self) -> String {
        self.function.half(&self.function.digest(&self.key), false)
    }

    fn filter(&self, range: &str, within: Option<&Cells>) -> String {
        let Some(within) = within else { return range.to_owned() };
        let cells = within.cells.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        format!("{range} AND ({} & {}) = ANY ('{{{cells}}}'::int8[])", self.key_hash(), mask(within.bits))
    }

    /// The rows of a range that are in these cells.
    pub(super) fn condition(&self, range: &str, cells: &Cells) -> String {
        self.filter(range, (cells.bits > 0).then_some(cells))
    }

    /// `cell int8, rows int8, sum of first halves text, sum of second halves text`, one row per cell that has rows.
    ///
    /// OFFSET 0 keeps the planner from merging the two queries and computing the digest twice.
    pub(super) fn digests(&self, from: &str, range: &str, within: Option<&Cells>, bits: u32) -> String {
        let cell = if bits == 0 { "0::int8".to_owned() } else { format!("({} & {})", self.key_hash(), mask(bits)) };
        format!(
            "SELECT c, pg_catalog.count(*), pg_catalog.sum({})::text, pg_catalog.sum({})::text \
             FROM (SELECT {cell} AS c, {} AS d FROM {from} AS t WHERE {} OFFSET 0) AS x GROUP BY c",
            self.function.half("d", false),
            self.function.half("d", true),
            self.function.digest(&self.row),
            self.filter(range, within),
        )
    }

    /// `hash of the key int8, hash per column int8[], key bytea[]`, one row per row, in no order.
    pub(super) fn rows_by_key(&self, from: &str, range: &str, within: &Cells) -> String {
        let half =
            |column: &String| self.function.half(&self.function.digest(&text_of(std::slice::from_ref(column))), false);
        let hashes: Vec<String> = self.columns.iter().map(half).collect();
        format!(
            "SELECT {}, ARRAY[{}]::int8[], {} FROM {from} AS t WHERE {}",
            self.key_hash(),
            hashes.join(", "),
            printed(&self.key_columns, "{}"),
            self.filter(range, Some(within))
        )
    }

    /// `hash of the row int8, its second half int8, how often int8`, one row per distinct row: where there is no key.
    pub(super) fn rows_by_hash(&self, from: &str, range: &str, within: &Cells) -> String {
        format!(
            "SELECT {}, {}, pg_catalog.count(*) \
             FROM (SELECT {} AS d FROM {from} AS t WHERE {} OFFSET 0) AS x GROUP BY 1, 2",
            self.function.half("d", false),
            self.function.half("d", true),
            self.function.digest(&self.row),
            self.filter(range, Some(within)),
        )
    }

    /// `hash of the key int8, key bytea[], values bytea[]` of the rows whose hash of the key is one of these; a
    /// value is cut after `length` characters.
    pub(super) fn values(&self, from: &str, range: &str, key_hashes: &[i64], length: usize) -> String {
        let hashes = key_hashes.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        format!(
            "SELECT {0}, {1}, {2} FROM {from} AS t WHERE {range} AND {0} = ANY ('{{{hashes}}}'::int8[])",
            self.key_hash(),
            printed(&self.key_columns, "{}"),
            printed(&self.shown, &format!("pg_catalog.substr({{}}, 1, {length})")),
        )
    }
}

/// A column as it goes into the hash. A bytea is hashed first: its text is twice as long and could pass 1 GB.
fn value(function: HashFunction, column: &SharedColumn) -> String {
    let plain = format!("t.{}", sql::identifier(&column.name));
    match function {
        _ if !column.is_bytea => bits(column).unwrap_or(plain),
        HashFunction::Old(_) => format!("pg_catalog.md5({plain})"),
        _ => format!("pg_catalog.sha256({plain})"),
    }
}

/// A float by its bits, where its text would not be the same. There is more than one NaN, and all are one value.
fn bits(column: &SharedColumn) -> Option<String> {
    let (name, send) = (format!("t.{}", sql::identifier(&column.name)), column.sent_by?);
    let sent = format!("pg_catalog.{send}({name})");
    Some(match send {
        "float4send" | "float8send" => {
            format!("CASE WHEN {name} OPERATOR(pg_catalog.=) 'NaN' THEN '\\x'::bytea ELSE {sent} END")
        }
        _ => sent,
    })
}

/// One text for several values, different whenever one of them prints differently.
fn text_of(columns: &[String]) -> String {
    let group =
        |group: &[String]| format!("pg_catalog.format('{}', {})", vec!["%L"; group.len()].join(","), group.join(", "));
    let groups: Vec<String> = columns.chunks(COLUMNS_PER_GROUP).map(group).collect();
    match groups.len() {
        0 => "''::text".to_owned(),
        1 => groups.concat(),
        _ => format!("pg_catalog.concat({})", groups.join(", ',', ")),
    }
}

/// The printed values as bytea[], in the client's encoding; NULL for NULL.
///
/// `IS NOT DISTINCT FROM NULL` is false for a composite value whose fields are NULL, where `IS NULL` is true, and it
/// needs no operator of the type.
fn printed(columns: &[String], cut: &str) -> String {
    let one = |column: &String| {
        let text = cut.replace("{}", &format!("pg_catalog.format('%s', {column})"));
        format!("CASE WHEN {column} IS NOT DISTINCT FROM NULL THEN NULL ELSE pg_catalog.textsend({text}) END")
    };
    format!("ARRAY[{}]::bytea[]", columns.iter().map(one).collect::<Vec<_>>().join(", "))
}

fn mask(bits: u32) -> i64 {
    (1_i64 << bits.min(62)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_hash_needs_one_encoding_and_one_answer() {
        assert_eq!(choose("UTF8", "UTF8", true), HashFunction::Fast);
        assert_eq!(choose("UTF8", "UTF8", false), HashFunction::Portable("UTF8"));
        assert_eq!(choose("LATIN1", "UTF8", true), HashFunction::Portable("UTF8"));
        assert_eq!(choose("SQL_ASCII", "UTF8", true), HashFunction::Portable("SQL_ASCII"));
    }

    #[test]
    fn a_row_wider_than_a_function_call_is_hashed_in_groups() {
        let columns: Vec<String> = (0..200).map(|at| format!("c{at}")).collect();
        let text = text_of(&columns);
        assert_eq!(text.matches("format(").count(), 3);
        assert_eq!(text.matches("%L").count(), 200);
        assert_eq!(text_of(&[]), "''::text");
    }

    #[test]
    fn a_mask_keeps_the_hash_positive() {
        assert_eq!((mask(0), mask(10), mask(64)), (0, 1023, (1 << 62) - 1));
    }
}
