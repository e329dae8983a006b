//! What has changed on a server that the stream does not show (I11), in words.

use std::collections::BTreeMap;

/// What changed between two fingerprints, as people would say it.
pub fn changes(before: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Vec<String> {
    // An empty hash stands for what the cutover itself changes, or has left to be done.
    let known = |object: &str| before.get(object).is_some_and(|hash| !hash.is_empty());
    let gone = before.keys().filter(|object| known(object) && !now.contains_key(*object));
    let gone = gone.map(|object| format!("{object} is gone"));
    let other = now.iter().filter_map(|(object, hash)| match before.get(object) {
        None => Some(format!("{object} is new")),
        Some(was) if was != hash && known(object) => Some(format!("{object} has changed")),
        Some(_) => None,
    });
    gone.chain(other).collect()
}

/// Whether a change is that of this object: `table public.a` is not `table public.ab`.
pub(super) fn is_waived(change: &str, waived: &str) -> bool {
    change.strip_prefix(waived).is_some_and(|rest| matches!(rest, " is gone" | " is new" | " has changed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_as_people_would_say_them() {
        let map = |entries: &[(&str, &str)]| entries.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        let before = map(&[("table a", "1"), ("table b", "1"), ("index c", "1")]);
        let now = map(&[("table a", "1"), ("table b", "2"), ("index d", "1")]);
        assert_eq!(changes(&before, &now), ["index c is gone", "index d is new", "table b has changed"]);
        assert!(changes(&before, &before).is_empty());
        let expected = map(&[("table a", "1"), ("table b", ""), ("index c", "")]);
        assert_eq!(changes(&expected, &now), ["index d is new"], "what the cutover itself changes");
    }

    #[test]
    fn i11_one_object_is_waived_and_not_those_whose_names_begin_alike() {
        assert!(is_waived("table a.b is new", "table a.b"));
        assert!(is_waived("index a.b is gone", "index a.b"));
        for other in ["table a.b", "table a.bc is new", "column c of table a.b has changed"] {
            assert!(!is_waived(other, "table a.b"), "{other}");
        }
        assert!(!is_waived("table a.b is new", ""), "nothing named is nothing waived");
    }
}
