//! What `--json` prints, against the schemas in `docs/schema`.

use std::path::{Path, PathBuf};

use serde_json::Value;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema")
}

fn schema(name: &str) -> Value {
    let path = directory().join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Panics unless a value is what the schema of this name says, and nothing of it is without a description there. The schemas themselves
/// let fields be that they do not know: later versions add some.
#[track_caller]
pub fn assert_valid(name: &str, value: &Value) {
    let schema = schema(name);
    let mut faults = Vec::new();
    validate(&schema, &schema, value, "", &mut faults);
    assert!(faults.is_empty(), "{name}: {faults:#?}\n{value:#}");
}

/// The keywords of JSON Schema (draft 2020-12) that the schemas use; any other is a fault of the schema.
fn validate(root: &Value, schema: &Value, value: &Value, at: &str, faults: &mut Vec<String>) {
    let Some(keywords) = schema.as_object() else { return faults.push(format!("{at}: no schema: {schema}")) };
    for (keyword, said) in keywords {
        let fault = match keyword.as_str() {
            "$schema" | "title" | "description" | "$defs" => None,
            "$ref" => {
                let pointer = said.as_str().unwrap().trim_start_matches('#');
                match root.pointer(pointer) {
                    Some(named) => validate(root, named, value, at, faults),
                    None => faults.push(format!("{at}: there is no {said}")),
                }
                None
            }
            "anyOf" => {
                let fits = |one: &Value| {
                    let mut faults = Vec::new();
                    validate(root, one, value, at, &mut faults);
                    faults.is_empty()
                };
                (!said.as_array().unwrap().iter().any(fits)).then(|| format!("none of {said}"))
            }
            "type" => {
                let is = |name: &Value| match name.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "number" => value.is_number(),
                    other => panic!("{at}: type {other}"),
                };
                let fits = said.as_array().map_or_else(|| is(said), |types| types.iter().any(is));
                (!fits).then(|| format!("not of type {said}"))
            }
            "const" => (value != said).then(|| format!("not {said}")),
            "enum" => (!said.as_array().unwrap().contains(value)).then(|| format!("none of {said}")),
            "minimum" => {
                value.as_f64().filter(|number| *number < said.as_f64().unwrap()).map(|_| format!("less than {said}"))
            }
            // The only one is that of an LSN.
            "pattern" => {
                assert_eq!(said, "^[0-9A-F]+/[0-9A-F]+$");
                let hex = |part: &str| !part.is_empty() && part.chars().all(|c| matches!(c, '0'..='9' | 'A'..='F'));
                let is_lsn = |text: &str| text.split_once('/').is_some_and(|(high, low)| hex(high) && hex(low));
                value.as_str().filter(|text| !is_lsn(text)).map(|_| "no LSN".to_owned())
            }
            "required" => {
                let names = said.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
                let missing: Vec<&str> = names.filter(|name| value.is_object() && value.get(*name).is_none()).collect();
                (!missing.is_empty()).then(|| format!("without {missing:?}"))
            }
            "properties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    match said.get(name) {
                        Some(known) => validate(root, known, member, &format!("{at}/{name}"), faults),
                        None => faults.push(format!("{at}/{name}: not in the schema")),
                    }
                }
                None
            }
            "additionalProperties" => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    validate(root, said, member, &format!("{at}/{name}"), faults);
                }
                None
            }
            "items" => {
                for (place, item) in value.as_array().into_iter().flatten().enumerate() {
                    validate(root, said, item, &format!("{at}/{place}"), faults);
                }
                None
            }
            other => Some(format!("the keyword {other} is not known here")),
        };
        faults.extend(fault.map(|fault| format!("{at}: {fault}: {value}")));
    }
}

#[test]
fn every_field_of_every_schema_is_described_and_every_schema_is_linked() {
    fn look(value: &Value, at: &str) {
        if let Some(properties) = value.get("properties").and_then(Value::as_object) {
            for (name, property) in properties {
                let described = property["description"].as_str().is_some_and(|text| !text.is_empty());
                assert!(described, "{at}/{name} has no description");
            }
        }
        for (name, inner) in value.as_object().into_iter().flatten() {
            look(inner, &format!("{at}/{name}"));
        }
    }
    let index = std::fs::read_to_string(directory().join("README.md")).unwrap();
    let mut seen = 0;
    for file in std::fs::read_dir(directory()).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let Some(stem) = name.strip_suffix(".json") else { continue };
        look(&schema(stem), stem);
        assert!(index.contains(&format!("({name})")), "docs/schema/README.md does not name {name}");
        seen += 1;
    }
    assert!(seen >= 10);
}

#[test]
fn what_is_not_as_the_schema_says_is_found() {
    let faults = |value: Value| {
        let schema = schema("pause");
        let mut faults = Vec::new();
        validate(&schema, &schema, &value, "", &mut faults);
        faults.len()
    };
    assert_eq!(faults(serde_json::json!({"version": 1, "apply": true, "copy": false})), 0);
    assert_eq!(faults(serde_json::json!({"version": 2, "apply": true, "copy": false})), 1);
    assert_eq!(faults(serde_json::json!({"version": 1, "apply": "true", "copy": false})), 1);
    assert_eq!(faults(serde_json::json!({"version": 1, "apply": true})), 1);
    assert_eq!(faults(serde_json::json!({"version": 1, "apply": true, "copy": false, "more": 1})), 1);
}
