//! Every message from its wire form, written here by hand from the manual; then what must hold for any bytes. What a
//! real server sends is tested by `tests/proto_fixtures.rs`.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::lsn::Lsn;

/// A message under construction, in the types of the manual.
#[derive(Clone, Default)]
struct Wire(Vec<u8>);

impl Wire {
    fn tag(tag: u8) -> Wire {
        Wire(vec![tag])
    }
    fn i8(self, value: u8) -> Wire {
        self.bytes(&[value])
    }
    fn i16(self, value: i16) -> Wire {
        self.bytes(&value.to_be_bytes())
    }
    fn i32(self, value: i32) -> Wire {
        self.bytes(&value.to_be_bytes())
    }
    fn i64(self, value: i64) -> Wire {
        self.bytes(&value.to_be_bytes())
    }
    fn string(self, value: &str) -> Wire {
        self.bytes(value.as_bytes()).i8(0)
    }
    fn bytes(mut self, value: &[u8]) -> Wire {
        self.0.extend_from_slice(value);
        self
    }
    fn tuple(self, columns: &[Datum<'_>]) -> Wire {
        columns.iter().fold(self.i16(columns.len() as i16), |wire, datum| match datum {
            Datum::Null => wire.i8(b'n'),
            Datum::Unchanged => wire.i8(b'u'),
            Datum::Text(value) => wire.i8(b't').i32(value.len() as i32).bytes(value),
            Datum::Binary(value) => wire.i8(b'b').i32(value.len() as i32).bytes(value),
        })
    }
    fn refused(&self) -> String {
        decode(&self.0).expect_err("decoded").to_string()
    }
}

const EVERY_KIND: [Datum<'static>; 5] =
    [Datum::Text(b"7"), Datum::Null, Datum::Unchanged, Datum::Binary(&[0, 0, 0, 9]), Datum::Text(b"")];

fn columns<'a>(tuple: &Tuple<'a>) -> Vec<Datum<'a>> {
    assert_eq!(tuple.columns().len(), tuple.len());
    tuple.columns().collect()
}

/// One valid message of every kind and form.
fn samples() -> Vec<Vec<u8>> {
    let row = || Wire::default().tuple(&EVERY_KIND).0;
    let change = |tag: u8| Wire::tag(tag).i32(16_384);
    [
        Wire::tag(b'B').i64(0x1_0000_0001).i64(-5).i32(731),
        Wire::tag(b'C').i8(0).i64(1).i64(2).i64(3),
        Wire::tag(b'O').i64(9).string("other"),
        Wire::tag(b'R').i32(5).string("public").string("t").i8(b'd').i16(1).i8(1).string("id").i32(23).i32(-1),
        Wire::tag(b'Y').i32(6).string("public").string("mood"),
        change(b'I').i8(b'N').bytes(&row()),
        change(b'U').i8(b'N').bytes(&row()),
        change(b'U').i8(b'K').bytes(&row()).i8(b'N').bytes(&row()),
        change(b'U').i8(b'O').bytes(&row()).i8(b'N').bytes(&row()),
        change(b'D').i8(b'K').bytes(&row()),
        change(b'D').i8(b'O').bytes(&row()),
        Wire::tag(b'T').i32(2).i8(3).i32(5).i32(-1),
        Wire::tag(b'M').i8(1).i64(4).string("walferry").i32(3).bytes(b"a\0b"),
    ]
    .map(|wire| wire.0)
    .to_vec()
}

#[test]
fn begin_and_commit_carry_positions_and_times() {
    let begin = Wire::tag(b'B').i64(0x16_B374_D848).i64(-1).i32(-2);
    let expected = Message::Begin { commit_lsn: Lsn(0x16_B374_D848), commit_time: -1, xid: u32::MAX - 1 };
    assert_eq!(decode(&begin.0), Ok(expected));

    let commit = Wire::tag(b'C').i8(0).i64(-1).i64(8).i64(9);
    let expected = Message::Commit { commit_lsn: Lsn::MAX, end_lsn: Lsn(8), commit_time: 9 };
    assert_eq!(decode(&commit.0), Ok(expected));
}

#[test]
fn origin_and_type_carry_names() {
    let origin = Wire::tag(b'O').i64(7).string("wü");
    assert_eq!(decode(&origin.0), Ok(Message::Origin { commit_lsn: Lsn(7), name: "wü" }));

    let data_type = Wire::tag(b'Y').i32(-1).string("s").string("mood");
    assert_eq!(decode(&data_type.0), Ok(Message::Type { oid: u32::MAX, schema: "s", name: "mood" }));
}

#[test]
fn an_empty_schema_is_pg_catalog() {
    let data_type = Wire::tag(b'Y').i32(1).string("").string("mood");
    assert_eq!(decode(&data_type.0), Ok(Message::Type { oid: 1, schema: "pg_catalog", name: "mood" }));

    let relation = Wire::tag(b'R').i32(1).string("").string("t").i8(b'n').i16(0);
    let Ok(Message::Relation(relation)) = decode(&relation.0) else { panic!("not a relation") };
    assert_eq!((relation.schema, relation.columns().len()), ("pg_catalog", 0));
}

#[test]
fn a_relation_carries_its_columns() {
    for (letter, identity) in [
        (b'd', ReplicaIdentity::Default),
        (b'n', ReplicaIdentity::Nothing),
        (b'f', ReplicaIdentity::Full),
        (b'i', ReplicaIdentity::Index),
    ] {
        let wire = Wire::tag(b'R').i32(17).string("Sales").string("Order \"1\"").i8(letter).i16(2);
        let wire = wire.i8(1).string("id").i32(20).i32(-1).i8(0).string("").i32(1043).i32(68);
        let Ok(Message::Relation(relation)) = decode(&wire.0) else { panic!("not a relation") };
        assert_eq!((relation.relid, relation.schema, relation.name), (17, "Sales", "Order \"1\""));
        assert_eq!(relation.identity, identity);
        let expected = [
            RelationColumn { is_key: true, name: "id", type_oid: 20, type_modifier: -1 },
            RelationColumn { is_key: false, name: "", type_oid: 1043, type_modifier: 68 },
        ];
        assert_eq!(relation.columns().collect::<Vec<_>>(), expected);
    }
}

#[test]
fn an_insert_carries_every_kind_of_column() {
    let wire = Wire::tag(b'I').i32(17).i8(b'N').tuple(&EVERY_KIND);
    let Ok(Message::Insert { relid: 17, new }) = decode(&wire.0) else { panic!("not an insert") };
    assert_eq!(columns(&new), EVERY_KIND);
    assert!(!new.is_empty());
}

#[test]
fn an_update_carries_the_old_key_the_old_row_or_neither() {
    let new_row = [Datum::Text(b"2"), Datum::Null];
    let old_row = [Datum::Text(b"1"), Datum::Text(b"x")];
    let start = Wire::tag(b'U').i32(17);

    let plain = start.clone().i8(b'N').tuple(&new_row);
    let Ok(Message::Update { relid: 17, old: None, new }) = decode(&plain.0) else {
        panic!("{plain:?}", plain = plain.0)
    };
    assert_eq!(columns(&new), new_row);

    let by_key = start.clone().i8(b'K').tuple(&old_row).i8(b'N').tuple(&new_row);
    let Ok(Message::Update { old: Some(OldTuple::Key(old)), new, .. }) = decode(&by_key.0) else { panic!("no key") };
    assert_eq!((columns(&old), columns(&new)), (old_row.to_vec(), new_row.to_vec()));

    let full = start.i8(b'O').tuple(&old_row).i8(b'N').tuple(&new_row);
    let Ok(Message::Update { old: Some(OldTuple::Full(old)), new, .. }) = decode(&full.0) else { panic!("no old row") };
    assert_eq!((columns(&old), columns(&new)), (old_row.to_vec(), new_row.to_vec()));
}

#[test]
fn a_delete_carries_the_old_key_or_the_old_row() {
    let by_key = Wire::tag(b'D').i32(17).i8(b'K').tuple(&EVERY_KIND);
    let Ok(Message::Delete { relid: 17, old: old @ OldTuple::Key(key) }) = decode(&by_key.0) else { panic!("no key") };
    assert_eq!(columns(&key), EVERY_KIND);
    assert_eq!(old.tuple(), key);

    let full = Wire::tag(b'D').i32(17).i8(b'O').tuple(&[]);
    let Ok(Message::Delete { old: OldTuple::Full(row), .. }) = decode(&full.0) else { panic!("no old row") };
    assert!(row.is_empty() && columns(&row).is_empty());
}

#[test]
fn a_truncate_carries_its_tables_and_options() {
    for (options, expected) in [(0, (false, false)), (1, (true, false)), (2, (false, true)), (3, (true, true))] {
        let wire = Wire::tag(b'T').i32(2).i8(options).i32(17).i32(-1);
        let Ok(Message::Truncate { relids, cascade, restart_identity }) = decode(&wire.0) else { panic!("{options}") };
        assert_eq!((cascade, restart_identity), expected);
        assert_eq!((relids.len(), relids.collect()), (2, vec![17, u32::MAX]));
    }
}

#[test]
fn a_logical_message_carries_any_bytes() {
    for transactional in [false, true] {
        let wire = Wire::tag(b'M').i8(transactional.into()).i64(5).string("p").i32(3).bytes(&[0, 255, 0]);
        let expected = Message::Logical { transactional, lsn: Lsn(5), prefix: "p", content: &[0, 255, 0] };
        assert_eq!(decode(&wire.0), Ok(expected));
    }
}

#[test]
fn a_refusal_names_message_expectation_and_offset() {
    let insert = || Wire::tag(b'I').i32(17).i8(b'N');
    let relation = || Wire::tag(b'R').i32(1).string("s");
    let cases = [
        (Wire::default(), "pgoutput message: expected a message tag at offset 0, found 0 bytes"),
        // A stream start, of protocol version 2.
        (
            Wire::tag(b'S'),
            "pgoutput message: expected the tag of a protocol version 1 message at offset 0, found 0x53 (S)",
        ),
        (Wire::tag(b'B').i64(1).i8(0), "Begin message: expected the commit time at offset 9, found 1 byte"),
        (Wire::tag(b'C').i8(1), "Commit message: expected no flags (0) at offset 1, found 0x01"),
        (
            Wire::tag(b'I').i32(1).i8(b'K'),
            "Insert message: expected the mark of a new tuple (N) at offset 5, found 0x4b (K)",
        ),
        (insert().i16(-1), "Insert message: expected a number of columns at offset 6, found -1"),
        (insert().i16(1).i8(b'x'), "Insert message: expected a column kind (n, u, t or b) at offset 8, found 0x78 (x)"),
        (
            insert().i16(1).i8(b't').i32(-1).i8(0),
            "Insert message: expected the length of a text value at offset 9, found a length of -1 with 1 bytes left",
        ),
        (
            insert().i16(1).i8(b'b').i32(i32::MAX).i8(0),
            "Insert message: expected the length of a binary value at offset 9, found a length of 2147483647 with 1 bytes left",
        ),
        (insert().i16(0).i8(0), "Insert message: expected the end of the message at offset 8, found 1 byte"),
        (
            Wire::tag(b'U').i32(1).i8(b'X'),
            "Update message: expected the mark of a key, an old or a new tuple (K, O or N) at offset 5, found 0x58 (X)",
        ),
        (
            Wire::tag(b'U').i32(1).i8(b'K').i16(0).i8(b'O'),
            "Update message: expected the mark of a new tuple (N) at offset 8, found 0x4f (O)",
        ),
        (
            Wire::tag(b'D').i32(1).i8(b'N'),
            "Delete message: expected the mark of a key or an old tuple (K or O) at offset 5, found 0x4e (N)",
        ),
        (
            Wire::tag(b'T').i32(-1).i8(0),
            "Truncate message: expected the OIDs of as many relations as announced at offset 6, found a length of -1 with 0 bytes left",
        ),
        (
            Wire::tag(b'T').i32(0).i8(4),
            "Truncate message: expected options of TRUNCATE (0 to 3) at offset 5, found 0x04",
        ),
        (Wire::tag(b'M').i8(2), "Logical message: expected a logical message's flags (0 or 1) at offset 1, found 0x02"),
        (
            Wire::tag(b'O').i64(1).bytes(b"name"),
            "Origin message: expected the origin's name in UTF-8 at offset 9, found no zero byte up to the end",
        ),
        (
            Wire::tag(b'Y').i32(1).string("").bytes(b"a\xFF\0"),
            "Type message: expected a type's name in UTF-8 at offset 6, found bytes that are not UTF-8",
        ),
        (
            relation().string("t").i8(b'x'),
            "Relation message: expected a replica identity (d, n, f or i) at offset 9, found 0x78 (x)",
        ),
        (
            relation().string("t").i8(b'd').i16(1).i8(2),
            "Relation message: expected a column's flags (0 or 1) at offset 12, found 0x02",
        ),
    ];
    for (wire, expected) in cases {
        assert_eq!(wire.refused(), expected);
    }
    let error = decode(b"C\x01").expect_err("decoded");
    assert_eq!((error.message(), error.expected(), error.offset()), ("Commit", "no flags (0)", 1));
}

#[test]
fn a_refusal_and_a_debug_text_keep_row_values_to_themselves() {
    let row = [Datum::Text(b"s3cret"), Datum::Binary(b"s3cret"), Datum::Null, Datum::Unchanged];
    let wire = Wire::tag(b'I').i32(1).i8(b'N').tuple(&row);
    let text = format!("{:?}", decode(&wire.0).expect("valid"));
    assert_eq!(text, "Insert { relid: 1, new: [text of 6 bytes, binary of 6 bytes, null, unchanged] }");

    let error = crate::error::Error::from(decode(&wire.i8(0).0).expect_err("a byte too many"));
    assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
}

#[test]
fn every_truncation_of_a_message_is_refused_and_so_is_every_byte_too_many() {
    for sample in samples() {
        let message = decode(&sample).unwrap_or_else(|error| panic!("{error}: {sample:?}"));
        for length in 0..sample.len() {
            assert!(decode(&sample[..length]).is_err(), "{message:?} cut to {length} bytes");
        }
        for more in [0, b'N', 255] {
            assert!(decode(&[sample.as_slice(), &[more]].concat()).is_err(), "{message:?} and {more}");
        }
    }
}

/// Columns of every kind with values of any bytes.
fn any_columns() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    vec((prop::sample::select(b"nutb".to_vec()), vec(any::<u8>(), 0..20)), 0..12)
}

fn datums(columns: &[(u8, Vec<u8>)]) -> Vec<Datum<'_>> {
    fn datum((kind, value): &(u8, Vec<u8>)) -> Datum<'_> {
        match kind {
            b'n' => Datum::Null,
            b'u' => Datum::Unchanged,
            b't' => Datum::Text(value),
            _ => Datum::Binary(value),
        }
    }
    columns.iter().map(datum).collect()
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        crate::fuzzing::decode(&bytes);
    }

    #[test]
    fn any_bytes_after_any_tag_are_decoded_or_refused(
        tag in prop::sample::select(b"BCORYIUDTM".to_vec()),
        // Small values, so that counts, lengths and kinds are often right.
        bytes in vec(prop_oneof![Just(0), 0..4_u8, prop::sample::select(b"NKOnutbdf".to_vec())], 0..80),
    ) {
        crate::fuzzing::decode(&[&[tag], bytes.as_slice()].concat());
    }

    #[test]
    fn flipped_bits_are_decoded_or_refused(
        sample in prop::sample::select(samples()),
        flips in vec((any::<prop::sample::Index>(), 0..8_u32), 1..4),
    ) {
        let mut bytes = sample;
        for (place, bit) in flips {
            let place = place.index(bytes.len());
            bytes[place] ^= 1 << bit;
        }
        crate::fuzzing::decode(&bytes);
    }

    #[test]
    fn any_row_comes_back_as_it_was_written(old in any_columns(), new in any_columns()) {
        let (old, new) = (datums(&old), datums(&new));
        let wire = Wire::tag(b'U').i32(1).i8(b'O').tuple(&old).i8(b'N').tuple(&new).0;
        let Ok(Message::Update { old: Some(OldTuple::Full(got_old)), new: got_new, .. }) = decode(&wire) else {
            panic!("{:?}", decode(&wire))
        };
        prop_assert_eq!(columns(&got_old), old);
        prop_assert_eq!(columns(&got_new), new);
        for length in 0..wire.len() {
            prop_assert!(decode(&wire[..length]).is_err());
        }
    }
}
