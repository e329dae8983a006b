//! Connections to both servers, as libpq would make them: one way in for both clients.
//!
//! ```text
//!  text ──parse──► parameters ◄── service file, PG* variables (environment)
//!                      │
//!                      ▼ spec: checked, with defaults
//!              ConnectionSpec ──login──► address → stream (TCP, Unix) → tls → Session
//!                      │                                                        ├─ tokio_postgres::Client
//!                      │                                                        ├─ wire::RawSession
//!                      └──child──► environment of pg_dump                       └─ source::replication::ReplicationSession
//! ```
//!
//! Every session starts with the same pinned settings. A password never leaves this module but in the login itself.

mod certificate;
mod child;
mod console;
mod count;
mod disclose;
mod environment;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod keywords;
mod login;
mod parse;
mod password_command;
pub(crate) mod pipeline;
mod settings;
mod spec;
mod stream;
mod tls;
pub(crate) mod wire;

pub use child::ChildEnvironment;
pub(crate) use child::{SECRET_VARIABLES, memory_file, without_secrets};
pub(crate) use console::Console;
pub use count::ConnectionCount;
pub(crate) use disclose::Disclosed;
pub(crate) use login::{ChannelBindingPolicy, Login, Session, first_row, no_password, open};
pub(crate) use password_command::ProcessGroup;
pub use spec::ConnectionSpec;
pub(crate) use stream::Stream;

#[cfg(test)]
mod tests;
