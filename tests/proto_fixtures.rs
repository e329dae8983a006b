//! What a real server sends, decoded without a server: the fixtures in `proto-fixtures/` (its README.md says how they
//! came to be). First each is compared with its own description; then, since the same decoder wrote that description,
//! each is held to what its SQL must have caused.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../proto-fixtures/format.rs"]
mod format;
#[path = "proto_fixtures/timescale.rs"]
mod timescale;

use std::collections::BTreeSet;
use std::path::PathBuf;

use walferry::decode::{Datum, Message, OldTuple, Relation, RelationColumn, ReplicaIdentity, Tuple, decode};
use walferry::lsn::Lsn;

use format::Captured;

const NAMES: [&str; 8] =
    ["delete", "insert", "logical-message", "origin", "relation", "truncate", "update", "update-old-row"];
/// Whose fixtures there are. Binary values and logical messages came with 14, TRUNCATE with 11.
const VERSIONS: std::ops::RangeInclusive<u32> = 10..=18;

/// A server's version and how its values come.
type From = (u32, &'static str);

/// Of which servers, and in which modes, there is a fixture.
fn of(name: &str) -> impl Iterator<Item = From> {
    let since = if name == "truncate" { 11 } else { 10 };
    let modes = |version| if version >= 14 { ["binary", "text"].iter() } else { ["text"].iter() };
    VERSIONS
        .filter(move |version| *version >= since)
        .flat_map(move |version| modes(version).map(move |mode| (version, *mode)))
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("proto-fixtures")
}

fn captured(name: &str, (version, mode): From) -> Vec<Captured> {
    let file = directory().join(format!("{version}/{name}.{mode}.txt"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let messages = format::read(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    assert!(!messages.is_empty(), "{} is empty", file.display());
    messages
}

fn decoded(captured: &[Captured]) -> Vec<Message<'_>> {
    fn message(Captured { bytes, .. }: &Captured) -> Message<'_> {
        decode(bytes).unwrap_or_else(|error| panic!("{error}: {bytes:02x?}"))
    }
    captured.iter().map(message).collect()
}

/// The messages between one transaction's begin and its commit, which must agree with each other.
fn transactions<'m, 'a>(messages: &'m [Message<'a>]) -> Vec<&'m [Message<'a>]> {
    let mut transactions = Vec::new();
    let mut rest = messages;
    while let Some(end) = rest.iter().position(|message| matches!(message, Message::Commit { .. })) {
        let (transaction, after) = rest.split_at(end + 1);
        let [Message::Begin { commit_lsn, commit_time, xid }, changes @ .., last] = transaction else {
            panic!("no begin in {transaction:?}")
        };
        let Message::Commit { commit_lsn: lsn, end_lsn, commit_time: time } = last else { unreachable!() };
        assert_eq!((commit_lsn, commit_time), (lsn, time));
        assert!(end_lsn > commit_lsn && *commit_lsn > Lsn::ZERO && *xid >= 3, "{transaction:?}");
        transactions.push(changes);
        rest = after;
    }
    assert!(rest.iter().all(|message| matches!(message, Message::Logical { transactional: false, .. })), "{rest:?}");
    transactions
}

fn row<'a>(tuple: &Tuple<'a>) -> Vec<Datum<'a>> {
    assert_eq!(tuple.len(), tuple.columns().len());
    tuple.columns().collect()
}

fn old_key<'a>(old: &OldTuple<'a>) -> Vec<Datum<'a>> {
    let OldTuple::Key(key) = old else { panic!("not a key: {old:?}") };
    row(key)
}

fn old_row<'a>(old: &OldTuple<'a>) -> Vec<Datum<'a>> {
    let OldTuple::Full(full) = old else { panic!("not a whole row: {old:?}") };
    row(full)
}

/// A number of four bytes as each mode sends it.
fn int<'a>(mode: &str, text: &'a str, binary: &'a [u8; 4]) -> Datum<'a> {
    if mode == "text" { Datum::Text(text.as_bytes()) } else { Datum::Binary(binary) }
}

/// A text as each mode sends it.
fn text<'a>(mode: &str, text: &'a str) -> Datum<'a> {
    if mode == "text" { Datum::Text(text.as_bytes()) } else { Datum::Binary(text.as_bytes()) }
}

const ONE: [u8; 4] = [0, 0, 0, 1];
const TWO: [u8; 4] = [0, 0, 0, 2];

fn column(is_key: bool, name: &str, type_oid: u32, type_modifier: i32) -> RelationColumn<'_> {
    RelationColumn { is_key, name, type_oid, type_modifier }
}

#[test]
fn every_fixture_decodes_as_it_says() {
    let files_of = |version: u32| {
        let files = std::fs::read_dir(directory().join(version.to_string())).unwrap();
        files.map(move |entry| format!("{version}/{}", entry.unwrap().file_name().into_string().unwrap()))
    };
    let fixtures: BTreeSet<String> = VERSIONS.flat_map(files_of).collect();
    let known =
        NAMES.iter().flat_map(|name| of(name).map(move |(version, mode)| format!("{version}/{name}.{mode}.txt")));
    assert_eq!(fixtures, known.collect(), "a fixture without a test, or the other way round");

    for name in NAMES {
        for from in of(name) {
            let captured = captured(name, from);
            for (one, message) in captured.iter().zip(decoded(&captured)) {
                let now = Captured { bytes: one.bytes.clone(), description: format::describe(&message) };
                assert_eq!(format::write(&now), format::write(one), "{name} {from:?}");
            }
        }
    }
}

#[test]
fn decoding_allocates_nothing() {
    for (name, from) in NAMES.iter().flat_map(|name| of(name).map(move |from| (name, from))) {
        for one in captured(name, from) {
            let allocated = allocation_counter::measure(|| {
                let count = |tuple: Tuple<'_>| tuple.columns().filter(|column| *column != Datum::Null).count();
                // What each message is looked at for; the sum is used, so that none of it can be left out.
                let seen = match decode(&one.bytes) {
                    Ok(Message::Insert { new, .. } | Message::Update { old: None, new, .. }) => count(new),
                    Ok(Message::Update { old: Some(old), new, .. }) => count(old.tuple()) + count(new),
                    Ok(Message::Delete { old, .. }) => count(old.tuple()),
                    Ok(Message::Relation(relation)) => relation.columns().map(|column| column.name.len()).sum(),
                    Ok(Message::Truncate { relids, .. }) => relids.count(),
                    other => usize::from(other.is_ok()),
                };
                std::hint::black_box(seen);
            });
            assert_eq!(allocated.count_total, 0, "{name} {from:?}: {}", one.description);
        }
    }
}

#[test]
fn no_truncation_of_a_captured_message_is_a_message() {
    for name in NAMES {
        for one in of(name).flat_map(|from| captured(name, from)) {
            for length in 0..one.bytes.len() {
                assert!(decode(&one.bytes[..length]).is_err(), "{name}: {} cut to {length}", one.description);
            }
        }
    }
}

#[test]
fn an_insert_has_every_value_in_text_mode() {
    for version in VERSIONS {
        an_insert_in_text_mode(version);
    }
}

fn an_insert_in_text_mode(version: u32) {
    let captured = captured("insert", (version, "text"));
    let messages = decoded(&captured);
    let [Message::Type { .. }, Message::Relation(_), first, second] = transactions(&messages)[0] else {
        panic!("{messages:?}")
    };
    let Message::Insert { new, .. } = first else { panic!("{first:?}") };
    let expected = ["7", "12.50", "drei \"Äpfel\"", "wild", "postgres=r/postgres", "\\x00ff", "{a,NULL}"];
    let mut expected: Vec<_> = expected.iter().map(|value| Datum::Text(value.as_bytes())).collect();
    expected.push(Datum::Null);
    assert_eq!(row(new), expected);

    let Message::Insert { new, .. } = second else { panic!("{second:?}") };
    let null = Datum::Null;
    assert_eq!(row(new), [Datum::Text(b"8"), null, Datum::Text(b""), null, null, null, null, null]);
}

#[test]
fn an_insert_has_every_value_in_binary_mode() {
    for (version, _) in of("insert").filter(|(_, mode)| *mode == "binary") {
        an_insert_in_binary_mode(version);
    }
}

fn an_insert_in_binary_mode(version: u32) {
    let captured = captured("insert", (version, "binary"));
    let messages = decoded(&captured);
    let [Message::Type { .. }, Message::Relation(_), first, second] = transactions(&messages)[0] else {
        panic!("{messages:?}")
    };
    let Message::Insert { new, .. } = first else { panic!("{first:?}") };
    let expected = [
        Datum::Binary(&[0, 0, 0, 0, 0, 0, 0, 7]),
        // numeric_send: two digits to base 10,000, weight 0, positive, two places: 12 and 5000.
        Datum::Binary(&[0, 2, 0, 0, 0, 0, 0, 2, 0, 12, 0x13, 0x88]),
        Datum::Binary("drei \"Äpfel\"".as_bytes()),
        Datum::Binary(b"wild"),
        // The type has no send function.
        Datum::Text(b"postgres=r/postgres"),
        Datum::Binary(&[0, 255]),
        // array_send: one dimension, with nulls, of text; two elements from 1: "a" and NULL.
        Datum::Binary(b"\0\0\0\x01\0\0\0\x01\0\0\0\x19\0\0\0\x02\0\0\0\x01\0\0\0\x01a\xFF\xFF\xFF\xFF"),
        Datum::Null,
    ];
    assert_eq!(row(new), expected);

    let Message::Insert { new, .. } = second else { panic!("{second:?}") };
    let null = Datum::Null;
    let eight = Datum::Binary(&[0, 0, 0, 0, 0, 0, 0, 8]);
    assert_eq!(row(new), [eight, null, Datum::Binary(b""), null, null, null, null, null]);
}

#[test]
fn a_type_and_a_relation_come_before_the_change_that_needs_them() {
    for from in of("insert") {
        let captured = captured("insert", from);
        let messages = decoded(&captured);
        let [Message::Type { oid, schema, name }, Message::Relation(relation), Message::Insert { relid, .. }, _] =
            transactions(&messages)[0]
        else {
            panic!("{messages:?}")
        };
        assert_eq!((*schema, *name), ("public", "mood"));
        assert_eq!((relation.relid, relation.schema, relation.name), (*relid, "public", "Every kind"));
        assert_eq!(relation.identity, ReplicaIdentity::Default);
        // The built-in types' OIDs never change (pg_type.dat). numeric(8,2) is 8 << 16 | 2, plus 4; varchar(20) 20, plus 4.
        let expected = [
            column(true, "id", 20, -1),
            column(false, "price", 1700, (8 << 16 | 2) + 4),
            column(false, "Größe", 1043, 24),
            column(false, "mood", *oid, -1),
            column(false, "access", 1033, -1),
            column(false, "data", 17, -1),
            column(false, "tags", 1009, -1),
            column(false, "nothing", 25, -1),
        ];
        assert_eq!(relation.columns().collect::<Vec<_>>(), expected, "and no generated column");
    }
}

#[test]
fn an_update_says_what_its_row_was_only_when_the_key_changed() {
    for from @ (_, mode) in of("update") {
        let captured = captured("update", from);
        let messages = decoded(&captured);
        let [first, second, third] = transactions(&messages)[..] else { panic!("{messages:?}") };
        let (one, two) = (int(mode, "1", &ONE), int(mode, "2", &TWO));
        let new_note = text(mode, "new");

        let [Message::Relation(relation), Message::Update { relid, old: None, new }] = first else {
            panic!("{first:?}")
        };
        assert_eq!((relation.name, relation.relid), ("by_key", *relid));
        assert_eq!(row(new), [one, new_note, Datum::Unchanged]);

        let [Message::Update { old: Some(old), new, .. }] = second else { panic!("{second:?}") };
        assert_eq!(old_key(old), [one, Datum::Null, Datum::Null]);
        assert_eq!(row(new), [two, new_note, Datum::Unchanged]);

        let [Message::Update { old: None, new, .. }] = third else { panic!("{third:?}") };
        assert_eq!(row(new), [two, new_note, Datum::Null]);
    }
}

#[test]
fn an_update_under_full_identity_has_the_whole_old_row_with_its_toasted_value() {
    for from @ (_, mode) in of("update-old-row") {
        let captured = captured("update-old-row", from);
        let messages = decoded(&captured);
        let [Message::Relation(relation), Message::Update { old: Some(old), new, .. }] = transactions(&messages)[0]
        else {
            panic!("{messages:?}")
        };
        assert_eq!(relation.identity, ReplicaIdentity::Full);
        assert!(relation.columns().all(|column| column.is_key));
        let one = int(mode, "1", &ONE);
        assert_eq!(old_row(old), [one, text(mode, "old"), text(mode, &"toast ".repeat(350))]);
        assert_eq!(row(new), [one, text(mode, "new"), Datum::Unchanged]);
    }
}

#[test]
fn a_delete_says_the_key_or_the_whole_row() {
    for from @ (_, mode) in of("delete") {
        let captured = captured("delete", from);
        let messages = decoded(&captured);
        let [first, second] = transactions(&messages)[..] else { panic!("{messages:?}") };
        let one = int(mode, "1", &ONE);

        let [Message::Relation(relation), Message::Delete { relid, old }] = first else { panic!("{first:?}") };
        assert_eq!((relation.name, relation.relid), ("gone_by_key", *relid));
        assert_eq!(old_key(old), [Datum::Null, one]);

        let [Message::Relation(relation), Message::Delete { relid, old }] = second else { panic!("{second:?}") };
        assert_eq!((relation.name, relation.relid), ("gone_by_row", *relid));
        assert_eq!(old_row(old), [text(mode, "old"), one, Datum::Null]);
    }
}

#[test]
fn a_truncate_names_its_tables_and_how_they_were_emptied() {
    for from in of("truncate") {
        let captured = captured("truncate", from);
        let messages = decoded(&captured);
        let seen: Vec<_> = transactions(&messages).into_iter().map(truncate).collect();
        let expected = [
            (vec!["single"], false, false),
            (vec!["parent", "child"], true, false),
            (vec!["single"], false, true),
            (vec!["single", "parent", "child"], true, true),
        ];
        assert_eq!(seen, expected);
    }
}

/// The names of the tables, CASCADE and RESTART IDENTITY of a transaction that does nothing else.
fn truncate<'a>(transaction: &[Message<'a>]) -> (Vec<&'a str>, bool, bool) {
    let [relations @ .., Message::Truncate { relids, cascade, restart_identity }] = transaction else {
        panic!("{transaction:?}")
    };
    let announced = |relid| {
        let name = relations.iter().find_map(|message| match message {
            Message::Relation(relation) if relation.relid == relid => Some(relation.name),
            _ => None,
        });
        name.unwrap_or_else(|| panic!("{relid} is not announced in {transaction:?}"))
    };
    (relids.clone().map(announced).collect(), *cascade, *restart_identity)
}

#[test]
fn a_logical_message_is_part_of_a_transaction_or_stands_alone() {
    for from in of("logical-message") {
        let captured = captured("logical-message", from);
        let messages = decoded(&captured);
        // An older server leaves the messages out, and the transaction in: so its commit can be a marker.
        if from.0 < 14 {
            assert_eq!(transactions(&messages), [[]]);
            continue;
        }
        let [Message::Begin { commit_lsn, .. }, inside, Message::Commit { end_lsn, .. }, alone, empty] = &messages[..]
        else {
            panic!("{messages:?}")
        };
        let Message::Logical { transactional: true, lsn, prefix: "walferry", content: b"marker 1" } = inside else {
            panic!("{inside:?}")
        };
        assert!(*lsn > Lsn::ZERO && lsn <= commit_lsn, "{lsn} {commit_lsn}");
        let Message::Logical { transactional: false, lsn: alone, prefix: "walferry", content: [0, 255] } = alone else {
            panic!("{alone:?}")
        };
        let Message::Logical { transactional: false, lsn: empty, prefix: "", content: [] } = empty else {
            panic!("{empty:?}")
        };
        assert!(end_lsn < alone && alone < empty, "{end_lsn} {alone} {empty}");
    }
}

#[test]
fn an_origin_says_where_the_transaction_came_from() {
    for from @ (_, mode) in of("origin") {
        let captured = captured("origin", from);
        let messages = decoded(&captured);
        // The origin's commit time, one second into 2000, stands in the place of the source's.
        let Message::Begin { commit_time: 1_000_000, .. } = messages[0] else { panic!("{:?}", messages[0]) };
        let [
            Message::Origin { commit_lsn, name: "elsewhere" },
            Message::Relation(relation),
            Message::Insert { new, .. },
        ] = transactions(&messages)[0]
        else {
            panic!("{messages:?}")
        };
        assert_eq!(*commit_lsn, "16/B374D848".parse().unwrap());
        assert_eq!(relation.name, "replicated");
        assert_eq!(row(new), [int(mode, "1", &ONE)]);
    }
}

#[test]
fn a_relation_says_its_identity_and_comes_again_when_it_changed() {
    for from in of("relation") {
        let captured = captured("relation", from);
        let messages = decoded(&captured);
        let relations: Vec<&Relation<'_>> = messages
            .iter()
            .filter_map(|message| match message {
                Message::Relation(relation) => Some(relation),
                _ => None,
            })
            .collect();
        let names: Vec<_> = relations.iter().map(|relation| (relation.schema, relation.name)).collect();
        let expected = [
            ("public", "identity_default"),
            ("public", "identity_default"),
            ("public", "identity_nothing"),
            ("public", "identity_full"),
            ("public", "identity_index"),
            ("public", "no_columns"),
            ("Lager", "the \"big\" table"),
            ("pg_catalog", "built_in"),
        ];
        assert_eq!(names, expected);
        let identities: Vec<_> = relations[1..5].iter().map(|relation| relation.identity).collect();
        use ReplicaIdentity::{Default, Full, Index, Nothing};
        assert_eq!(identities, [Default, Nothing, Full, Index]);

        let columns = |place: usize| relations[place].columns().collect::<Vec<_>>();
        let before = [column(true, "id", 23, -1), column(false, "note", 25, -1)];
        assert_eq!(columns(0), before);
        assert_eq!(columns(1), [before[0], before[1], column(false, "added", 1082, -1)]);
        assert_eq!(columns(2), [column(false, "id", 23, -1)]);
        assert_eq!(columns(3), [column(true, "id", 23, -1), column(true, "note", 25, -1)]);
        assert_eq!(
            columns(4),
            [column(false, "id", 23, -1), column(false, "a", 23, -1), column(true, "b", 1043, 8 + 4)]
        );
        assert_eq!(columns(5), []);

        let types: Vec<_> = messages.iter().filter(|message| matches!(message, Message::Type { .. })).collect();
        let [Message::Type { oid, schema: "pg_catalog", name: "size" }] = types[..] else { panic!("{types:?}") };
        assert_eq!(columns(7), [column(false, "size", *oid, -1)]);

        let rows: Vec<usize> = messages
            .iter()
            .filter_map(|message| match message {
                Message::Insert { new, .. } => Some(new.len()),
                _ => None,
            })
            .collect();
        assert_eq!(rows, [2, 3, 1, 2, 3, 0, 1, 1]);
    }
}
