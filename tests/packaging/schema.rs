//! As much of JSON Schema as the schemas beside this file use.

use serde_json::Value;

/// Everything in which a value is not as a schema says, each with its path. `root` is what `$ref` refers to.
pub fn violations(root: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(root, schema, value, "", &mut found);
    found
}

fn check(root: &Value, schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let referred = definition(root, reference).unwrap_or_else(|| panic!("{path}: no {reference} in the schema"));
        return check(root, referred, value, path, found);
    }
    if let Some(types) = schema.get("type") {
        let types: Vec<&str> = types
            .as_array()
            .map_or(vec![types], |types| types.iter().collect())
            .into_iter()
            .map(|kind| kind.as_str().unwrap())
            .collect();
        if !types.iter().any(|kind| is_of(value, kind)) {
            found.push(format!("{path}: {value} is not {types:?}"));
            return;
        }
    }
    if schema["enum"].as_array().is_some_and(|allowed| !allowed.contains(value)) {
        found.push(format!("{path}: {value} is not one of {}", schema["enum"]));
    }
    for (kind, exactly) in [("oneOf", true), ("anyOf", false)] {
        let Some(schemas) = schema[kind].as_array() else { continue };
        let tried: Vec<_> = schemas.iter().map(|schema| violations(root, schema, value)).collect();
        let held = tried.iter().filter(|violations| violations.is_empty()).count();
        if held == 0 || exactly && held > 1 {
            found.push(format!("{path}: {held} of {kind} hold: {}", tried.concat().join(", ")));
        }
    }
    if let Some(object) = value.as_object() {
        check_object(root, schema, object, path, found);
    }
    if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
        for (index, value) in values.iter().enumerate() {
            check(root, items, value, &format!("{path}/{index}"), found);
        }
        if schema["uniqueItems"] == true
            && values.iter().enumerate().any(|(index, value)| values[..index].contains(value))
        {
            found.push(format!("{path}: something stands twice"));
        }
    }
}

fn check_object(
    root: &Value,
    schema: &Value,
    object: &serde_json::Map<String, Value>,
    path: &str,
    found: &mut Vec<String>,
) {
    for name in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(name.as_str().unwrap()) {
            found.push(format!("{path}: {name} is missing"));
        }
    }
    for (name, value) in object {
        let path = format!("{path}/{name}");
        let patterns = schema["patternProperties"].as_object();
        let by_pattern =
            patterns.into_iter().flatten().find(|(pattern, _)| matches(pattern, name)).map(|(_, schema)| schema);
        match (schema["properties"].get(name).or(by_pattern), schema.get("additionalProperties")) {
            (Some(schema), _) => check(root, schema, value, &path, found),
            (None, Some(Value::Bool(false))) => found.push(format!("{path}: there is no such thing")),
            (None, Some(schema @ Value::Object(_))) => check(root, schema, value, &path, found),
            (None, _) => {}
        }
    }
}

fn is_of(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        other => panic!("{other} in a schema"),
    }
}

/// `#/definitions/name`, or the `id` that something has.
fn definition<'a>(root: &'a Value, reference: &str) -> Option<&'a Value> {
    root.pointer(reference.strip_prefix('#')?)
}

/// The few patterns that there are: names, extensions and anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern {
        "^x-" => name.starts_with("x-"),
        "^[a-zA-Z0-9._-]+$" => name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)),
        ".+" | "^.+$" => !name.is_empty(),
        "^[a-z]+$" => name.chars().all(|c| c.is_ascii_lowercase()),
        other => panic!("the pattern {other} in a schema"),
    }
}

#[test]
fn the_check_finds_what_is_wrong() {
    let schema = serde_json::json!({
        "definitions": {"port": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
        "properties": {"ports": {"type": "array", "items": {"$ref": "#/definitions/port"}, "uniqueItems": true}},
        "patternProperties": {"^x-": {}}, "additionalProperties": false, "required": ["ports"],
    });
    let violations = |value: &str| violations(&schema, &schema, &serde_json::from_str(value).unwrap()).len();
    assert_eq!(violations(r#"{"ports": [1, "2"], "x-note": null}"#), 0);
    for wrong in
        [r#"{}"#, r#"{"ports": 1}"#, r#"{"ports": [null]}"#, r#"{"ports": [1, 1]}"#, r#"{"ports": [], "port": 1}"#]
    {
        assert_eq!(violations(wrong), 1, "{wrong}");
    }
}
