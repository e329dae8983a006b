//! Which parts a table is copied in.

use crate::source::catalog::Table;
use crate::target::ledger::Part;

/// Bytes in a page, unless PostgreSQL was built otherwise; only the size of the parts depends on it.
const PAGE_BYTES: u64 = 8192;

/// Splits the tables into parts: a table of more than `split_above_bytes` into ranges of about a quarter of that, by
/// `ctid`, the last one open-ended (H3: rows that come after the plan are in it); every other table whole.
///
/// The order is that of the tables, so that what takes longest begins first.
pub fn plan<'a>(tables: impl IntoIterator<Item = &'a Table>, split_above_bytes: u64) -> Vec<Part> {
    let pages_per_part = (split_above_bytes / 4 / PAGE_BYTES).max(1).cast_signed();
    let mut parts = Vec::new();
    for table in tables {
        // A chunk is small, and may have to be read decompressed, where there are no pages.
        let split =
            table.chunk.is_none() && table.pages.max(0).cast_unsigned().saturating_mul(PAGE_BYTES) > split_above_bytes;
        let count = if split { (table.pages + pages_per_part - 1) / pages_per_part } else { 1 };
        let number = |part: i64| i32::try_from(part).unwrap_or(i32::MAX);
        parts.extend((0..count).map(|part| Part {
            relid: table.relid,
            part: number(part),
            first_page: part * pages_per_part,
            end_page: (part + 1 < count).then_some((part + 1) * pages_per_part),
        }));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(relid: u32, pages: i64) -> Table {
        Table { relid, pages, bytes: pages * 8192, ..Table::plain("public", "t") }
    }

    #[test]
    fn a_small_table_is_one_open_ended_part() {
        let parts = plan(&[table(1, 0), table(2, 128)], 1 << 20);
        assert_eq!(parts.len(), 2);
        assert!(parts.iter().all(|part| part.first_page == 0 && part.end_page.is_none()));
    }

    #[test]
    fn h03_ranges_follow_each_other_without_a_gap_and_the_last_is_open_ended() {
        for pages in [129, 1000, 1024, 99_999] {
            let parts = plan(&[table(1, pages)], 1 << 20);
            assert!(parts.len() > 1);
            assert_eq!(parts[0].first_page, 0);
            for pair in parts.windows(2) {
                assert_eq!(pair[0].end_page, Some(pair[1].first_page));
                assert_eq!(pair[0].part + 1, pair[1].part);
            }
            assert_eq!(parts[parts.len() - 1].end_page, None);
            assert!(parts[parts.len() - 1].first_page < pages, "no part is empty by plan");
        }
    }
}
