//! What a person, a script and a monitoring system see of a running migration. Nothing here changes the migration.
//!
//! ```text
//!  source, queue, copy, apply ──atomics──► StatusBoard ──snapshot()──► Status ─┬─► status --json, /status
//!                                                                              ├─► render: walferry status
//!                                                                              ├─► watch: walferry status --watch
//!                                                                              ├─► metrics: /metrics
//!                                                                              └─► progress: bars, or log lines
//! ```
//!
//! The parts of the migration write to the [`board`]; hot paths touch atomics only. Everybody else reads a
//! [`status::Status`], so the command line, the metrics and the bars can never tell different stories. Rates come
//! from a ticker ([`board::StatusBoard::start_ticker`]), which also brings the [`metrics`] up to date.

pub mod board;
pub mod format;
pub mod history;
pub mod http;
pub mod locale;
pub mod logging;
pub mod metrics;
pub mod progress;
pub mod render;
pub mod status;
pub mod table_progress;
pub mod wall_clock;
pub mod watch;

mod lag;
pub(crate) mod page;
mod rates;
