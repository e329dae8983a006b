//! What of a dump a target may refuse without a loss: an exact rule for each, and it is said. Everything else that is refused stops
//! the migration.
//!
//! | item | refused with | why nothing is lost |
//! |---|---|---|
//! | `COMMENT ON EXTENSION` | 42501, our role does not own it | `CREATE EXTENSION` has given it the comment of its control file; only one of the user's own words is missing, and is named |
//! | `COMMENT ON SCHEMA public` | 42501, our role does not own it | as above: every database is made with one |
//! | `SECURITY LABEL` | 22023, its provider is not loaded | without the provider the label means nothing on that server; the label is named |
//! | an index of a chunk's compressed rows | 42P01, there is no such relation | the chunk was decompressed on the source before its turn, so it came decompressed; where it is compressed again, the extension makes relation and index anew |
//! | `SET …` in the head of a script, such as `transaction_timeout`, which servers before 17 do not know | it is never run | our sessions have settings of their own, and an item begins behind its header ([`super::schema`]) |

use tokio_postgres::error::SqlState;

use super::ledger::SchemaItem;
use crate::error::Error;
use crate::timescale::copy;

/// Whether a rule speaks of this item: it is run so that its refusal harms no other.
pub fn may_be_refused(item: &SchemaItem) -> bool {
    refusal(item).is_some()
}

/// What is said of an item that was refused, if that is harmless.
pub fn explain(item: &SchemaItem, error: &Error) -> Option<String> {
    let (state, why) = refusal(item)?;
    (error.sqlstate() == Some(&state))
        .then(|| format!("left out, because {why}: {} {} ({error})", item.kind, item.name))
}

fn refusal(item: &SchemaItem) -> Option<(SqlState, &'static str)> {
    let begins = |text: &str| item.statement.starts_with(text);
    match item.kind.as_str() {
        "COMMENT" if begins("COMMENT ON EXTENSION ") => {
            Some((SqlState::INSUFFICIENT_PRIVILEGE, "the extension belongs to another role on the target"))
        }
        "COMMENT" if begins("COMMENT ON SCHEMA public IS ") => {
            Some((SqlState::INSUFFICIENT_PRIVILEGE, "the schema public belongs to another role on the target"))
        }
        "SECURITY LABEL" => {
            Some((SqlState::INVALID_PARAMETER_VALUE, "the label's provider is not loaded on the target"))
        }
        "INDEX" if copy::is_of_compressed_rows(&item.statement) => {
            Some((SqlState::UNDEFINED_TABLE, "its chunk came decompressed"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::ledger::Section;

    fn item(kind: &str, statement: &str) -> SchemaItem {
        SchemaItem {
            section: Section::PreData,
            kind: kind.into(),
            name: "n".into(),
            relid: None,
            statement: statement.into(),
        }
    }

    #[test]
    fn only_the_refusals_of_the_table_are_harmless() {
        let refused = |state: &str| Error::from_server(state, "no");
        let extension = item("COMMENT", "COMMENT ON EXTENSION hstore IS 'x';");
        assert!(explain(&extension, &refused("42501")).is_some_and(|said| said.contains("another role")));
        assert_eq!(explain(&extension, &refused("42704")), None, "an extension that is not there is a loss");
        let label = item("SECURITY LABEL", "SECURITY LABEL FOR p ON TABLE t IS 'x';");
        assert!(explain(&label, &refused("22023")).is_some());
        let of_compressed = "CREATE INDEX i ON _timescaledb_internal.compress_hyper_2_23_chunk USING btree (device);";
        assert!(explain(&item("INDEX", of_compressed), &refused("42P01")).is_some());
        assert_eq!(explain(&item("INDEX", of_compressed), &refused("53100")), None, "another refusal is a loss");
        for other in [
            item("INDEX", "CREATE INDEX i ON public.t USING btree (compress_hyper_);"),
            item("COMMENT", "COMMENT ON TABLE t IS 'COMMENT ON EXTENSION ';"),
            item("COMMENT", "COMMENT ON SCHEMA public2 IS 'x';"),
            item("TABLE", "COMMENT ON EXTENSION hstore IS 'x';"),
        ] {
            assert!(!may_be_refused(&other), "{other:?}");
            assert_eq!(explain(&other, &refused("42501")), None);
        }
    }
}
