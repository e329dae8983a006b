//! How walferry comes to where it runs: its version, the image and the trial with Docker Compose, Kubernetes, the Debian package.

#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

#[path = "../support/mod.rs"]
mod support;

mod compose_files;
mod deb;
mod engine;
mod kubernetes;
mod schema;
mod systemd;
mod trial;
mod version;

use std::path::{Path, PathBuf};

/// A file of the repository.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(file(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The documents of a YAML file.
fn yaml(name: &str) -> Vec<serde_json::Value> {
    let text = read(name);
    let documents = serde_yaml_ng::Deserializer::from_str(&text);
    let document =
        |document| serde::Deserialize::deserialize(document).unwrap_or_else(|error| panic!("{name}: {error}"));
    documents.map(document).collect()
}
