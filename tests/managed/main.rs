//! Roles as managed services give them: no superuser, no ALTER SYSTEM, no `session_replication_role`. The SQL that sets them up is that of
//! `docs/managed-services.md`, read out of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod service;
mod shop;
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod configuration;
mod origin;
mod poolers;
mod services;
mod timeouts;
