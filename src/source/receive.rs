//! From the slot into the queue: receives the stream, frames its transactions, acknowledges what is on disk.
//!
//! ```text
//!   START_REPLICATION at the queue's durable end
//!        │
//!        ▼            begin / data / commit            flush when the socket is drained, not too often
//!   ReplicationStream ────────────────────► Appender ────────────────────► writer thread: write, fsync
//!        ▲                                                                        │
//!        └───────────────── status: flushed = durable end (I1) ◄──────────────────┘
//! ```
//!
//! Progress: the only position that is ever confirmed is the queue's durable end. A keepalive's position goes into
//! the queue as a record of its own before it is confirmed, so that after a restart the slot can never be ahead of
//! the queue without a reason (H15).
//!
//! How it dies: before the fsync, nothing was confirmed and the source sends it again; after it, the queue has it. A
//! transaction cut off by a lost connection is dropped by [`Appender::rewind`] and comes again as a whole.

use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::error::SqlState;

use super::marker;
use super::replication::{ReplicationSession, ReplicationStream, StreamEvent};
use super::slot::{RESYNC, ServerIdentity};
use super::standby;
use crate::connection::ConnectionSpec;
use crate::decode::{self, Message};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::lsn::Lsn;
use crate::observe::board::{Side, StatusBoard};
use crate::observe::status::{Level, Queue as QueueStatus};
use crate::queue::{Appender, Queue, TransactionHead};

/// How often the source is told where we are, when nothing else makes us.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// How long the source may be silent, though asked to answer, before the connection counts as dead.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How often a keepalive's position is written to the queue.
const POSITION_INTERVAL: Duration = Duration::from_secs(1);
/// Complete transactions that come within so long of each other reach the queue together: a block, and an fsync, for each
/// would cost more than the transactions themselves. What comes after a pause goes at once.
const GATHER: Duration = Duration::from_millis(5);
/// How long the queue's disk may refuse everything. A path that fails over or a volume that is extended is waited for, since the
/// apply goes on meanwhile; a disk that is gone needs somebody, who hears of it by the end of the process.
const DISK_PATIENCE: Duration = Duration::from_secs(60);
/// The source sends each message by itself. While they come closer than `BUSY`, the socket is let be after each look at it that
/// found no more: what has come by then is read at once, instead of waking up for every message beside a server that needs the
/// processor. Longer where a look brings so much as only a backlog or a heavy load does.
const BUSY: Duration = Duration::from_micros(500);
const LET_BE: Duration = Duration::from_millis(1);
const LET_BE_LONG: Duration = Duration::from_millis(4);
const MUCH_BYTES: u64 = 16 << 10;
/// The longest wait between two attempts to connect.
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// How long a server may take to say that it shuts down; it says so before it asks who we are.
const SHUTDOWN_ANSWER_MAX: Duration = Duration::from_secs(2);

/// What the receiver needs to know of the slot, and of the server it was made on.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// The slot.
    pub slot: String,
    /// Its publications.
    pub publications: Vec<String>,
    /// Whether columns come in binary.
    pub binary: bool,
    /// The source's system identifier when the slot was made.
    pub source_system: String,
    /// The source's timeline when the slot was made.
    pub source_timeline: u32,
    /// What our sessions call themselves.
    pub application_name: String,
    /// Whether the slot is on a standby of that server.
    pub on_standby: bool,
}

/// Receives until it is dropped, or until something happens that no new attempt can mend.
///
/// In a thread of its own: there the socket can be let be (see `LET_BE`), while a runtime that also serves others hears of each
/// of the source's messages from the kernel. The thread has ended, and the appender with it, when this future is dropped.
///
/// # Errors
/// `Gap` when the stream cannot go on where the queue ends; `Queue` when the queue is corrupt; `Disk` when its disk has refused
/// everything for a minute; otherwise an error that is not transient, such as a password that is no longer accepted.
pub async fn run(
    source: ConnectionSpec,
    subscription: Subscription,
    queue: Queue,
    mut appender: Appender,
    board: StatusBoard,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context(|| "making what receives the stream".into())?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (said, outcome) = oneshot::channel();
    let span = tracing::Span::current();
    let thread = std::thread::Builder::new().name("receive".into()).spawn(move || {
        let _entered = span.enter();
        runtime.block_on(async {
            tokio::select! {
                ended = attempts(&source, &subscription, &queue, &mut appender, &board) => {
                    // Nobody is left to hear it but after the drop.
                    let _ = said.send(ended);
                }
                _ = stopped => {}
            }
        });
        // Not waiting for a name that is still being looked up.
        runtime.shutdown_background();
    });
    let _receiving =
        Receiving { stop: Some(stop), thread: Some(thread.context(|| "starting the thread that receives".into())?) };
    outcome.await.unwrap_or_else(|_| Err(Error::new(ErrorKind::Other, "the thread that receives the stream has ended")))
}

/// The thread; dropped, it is told to stop and waited for.
struct Receiving {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Receiving {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that receives the stream ended by a panic");
        }
    }
}

async fn attempts(
    source: &ConnectionSpec,
    subscription: &Subscription,
    queue: &Queue,
    appender: &mut Appender,
    board: &StatusBoard,
) -> Result<()> {
    let mut backoff = Duration::from_millis(200);
    // Since when the disk has refused, and what was durable then.
    let mut refused: Option<(Instant, Lsn)> = None;
    loop {
        let connected = Instant::now();
        let outcome = receive(source, subscription, queue, appender, board).await;
        board.set_connected(false);
        let Err(error) = outcome else { continue };
        if error.kind() == ErrorKind::Disk {
            // H17: what is not durable is given up, and comes again from the source.
            let durable = queue.durable_end();
            let since = refused.filter(|(_, end)| *end == durable).map_or_else(Instant::now, |(since, _)| since);
            if since.elapsed() > DISK_PATIENCE {
                return Err(error);
            }
            refused = Some((since, durable));
            show(queue, board);
        } else if !error.is_transient() {
            return Err(error);
        }
        if connected.elapsed() > BACKOFF_MAX {
            backoff = Duration::from_millis(200);
        }
        board.event(Level::Warn, format!("the stream from the source broke off; trying again: {error}"));
        tokio::time::sleep(jittered(backoff)).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
        board.reconnected(Side::Source);
    }
}

fn show(queue: &Queue, board: &StatusBoard) {
    let now = *queue.subscribe().borrow();
    board.set_queue(QueueStatus {
        bytes: now.bytes_on_disk,
        limit_bytes: queue.max_bytes(),
        full: now.full,
        durable_lsn: now.durable_end,
        written_lsn: now.written_end,
    });
}

/// One connection's life. Never returns `Ok` but when the source ended the stream in good order.
async fn receive(
    source: &ConnectionSpec,
    subscription: &Subscription,
    queue: &Queue,
    appender: &mut Appender,
    board: &StatusBoard,
) -> Result<()> {
    let from = appender.rewind().await?;
    let mut session = ReplicationSession::connect(source, &subscription.application_name).await?;
    prove_no_gap(&mut session, subscription, from).await?;
    end_stale_walsender(&mut session, subscription).await?;
    let sends_markers = session.streams_messages();
    let mut stream = session
        .start(&subscription.slot, from, &subscription.publications, subscription.binary)
        .await
        .context(|| format!("starting replication from the slot {} at {from}", subscription.slot))?;
    board.set_connected(true);
    board.event(Level::Info, format!("receiving changes from the source at {from}"));
    let server = Server { source, application_name: &subscription.application_name };
    let outcome = Receiver::new(queue, appender, board, from, sends_markers).run(&mut stream, server).await;
    if outcome.is_ok() {
        stream.stop().await?;
    }
    outcome.map_err(with_a_way_out)
}

/// PostgreSQL can come to a place in its own WAL that it cannot decode, and does not get past it: see [`super::slot::Relations`]
/// for the way that is known.
fn with_a_way_out(error: Error) -> Error {
    if error.sqlstate() != Some(&SqlState::INTERNAL_ERROR) {
        return error;
    }
    // "filenode", from 16 on "filenumber"; the server's own language may be another, which costs the better text.
    if !error.to_string().contains("could not map file") {
        return error.context("decoding the source's WAL").hint(format!(
            "Run the same command again. If it ends here again, the source cannot decode what the slot stands at; newer minor \
             releases of PostgreSQL mend such faults. {RESYNC}"
        ));
    }
    error
        .with_kind(ErrorKind::Gap)
        .context("the source cannot decode its own WAL: a table was emptied or rewritten while the slot was made")
        .hint(format!(
            "PostgreSQL's decoding can lose track of such a table, and this slot does not get past its changes; nothing that was \
             copied or applied is wrong. {RESYNC} Let no TRUNCATE, VACUUM FULL or ALTER TABLE run while it makes the slot."
        ))
}

/// H15: START_REPLICATION silently skips forward when it is asked for a position before the slot's confirmed one, and
/// another server can have a slot of the same name. So both are compared at every connect.
async fn prove_no_gap(session: &mut ReplicationSession, subscription: &Subscription, from: Lsn) -> Result<()> {
    let gap = |text: String, hint: String| Err(Error::new(ErrorKind::Gap, text).hint(hint));
    let identity = session.identify_system().await?;
    let expected =
        ServerIdentity { system: subscription.source_system.clone(), timeline: subscription.source_timeline };
    expected.prove(&ServerIdentity { system: identity.system_id, timeline: identity.timeline })?;
    let statement = format!(
        "SELECT confirmed_flush_lsn, pg_catalog.to_jsonb(s)->>'wal_status', {} FROM pg_catalog.pg_replication_slots s \
         WHERE slot_name = {} AND slot_type = 'logical' AND pg_catalog.pg_is_in_recovery() = {}",
        standby::INVALIDATED,
        crate::sql::literal(&subscription.slot),
        subscription.on_standby
    );
    let rows = session.simple_query(&statement).await?;
    let Some(row) = rows.first() else {
        let recovery = session.simple_query("SELECT pg_catalog.pg_is_in_recovery()").await?;
        let in_recovery = recovery.first().and_then(|row| row.first()).and_then(Option::as_deref) == Some("t");
        if in_recovery && !subscription.on_standby {
            return Err(Error::new(ErrorKind::Transient, "the source is a standby, which has no slot to read from")
                .hint("Walferry waits until --source leads to the primary again."));
        }
        return gap(
            format!(
                "the slot {} is gone from the source: changes after {from} can no longer be read",
                subscription.slot
            ),
            RESYNC.to_owned(),
        );
    };
    let field = |column: usize| row.get(column).and_then(Option::as_deref);
    if field(1) == Some("lost") {
        return gap(
            format!(
                "the source has removed WAL that the slot {} still needed (wal_status is lost): changes after {from} are gone",
                subscription.slot
            ),
            format!("Raise max_slot_wal_keep_size on the source. {RESYNC}"),
        );
    }
    if subscription.on_standby
        && let Some(reason) = field(2)
    {
        return gap(
            format!(
                "the standby has invalidated the slot {} ({reason}): changes after {from} can no longer be read",
                subscription.slot
            ),
            format!(
                "A standby does that when its primary removes rows of the catalog that the slot needs, or lowers wal_level: set \
                 hot_standby_feedback = on there, and primary_slot_name. {RESYNC}"
            ),
        );
    }
    let confirmed: Lsn = field(0).and_then(|text| text.parse().ok()).unwrap_or(Lsn::ZERO);
    if confirmed > from {
        return gap(
            format!(
                "the slot {} has been moved on to {confirmed}, but the queue ends at {from}: the changes between are lost",
                subscription.slot
            ),
            format!("Use the state directory that this migration was begun with. If it or its queue is lost: {RESYNC}"),
        );
    }
    Ok(())
}

/// Ends the walsender of a connection that we gave up and the source has not: it holds the slot until `wal_sender_timeout`,
/// which may be never. Nobody else's has our name, since the state directory is locked.
async fn end_stale_walsender(session: &mut ReplicationSession, subscription: &Subscription) -> Result<()> {
    let statement = format!(
        "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity WHERE application_name = {} \
         AND pid = (SELECT active_pid FROM pg_catalog.pg_replication_slots WHERE slot_name = {}) AND pid <> pg_catalog.pg_backend_pid()",
        crate::sql::literal(&subscription.application_name),
        crate::sql::literal(&subscription.slot)
    );
    session.simple_query(&statement).await?;
    Ok(())
}

/// Where the stream comes from.
#[derive(Clone, Copy)]
struct Server<'a> {
    source: &'a ConnectionSpec,
    application_name: &'a str,
}

impl Server<'_> {
    /// A server that is told to shut down waits until each walsender has sent all WAL, for as long as the other side says that it
    /// is there. While the queue is full we read nothing and say so: it would wait until the apply has made room, or for ever. So
    /// the stream is given up; what was not read comes again.
    ///
    /// # Errors
    /// `Transient` when the server takes no sessions any more, though it streams to us.
    async fn goes_on(self) -> Result<()> {
        let connecting = self.source.connect(self.application_name);
        match tokio::time::timeout(SHUTDOWN_ANSWER_MAX, connecting).await {
            Ok(Err(error)) if error.sqlstate() == Some(&SqlState::CANNOT_CONNECT_NOW) => Err(error.context(
                "the queue is full and the server shuts down: it would wait for our stream, which is closed therefore",
            )),
            _ => Ok(()),
        }
    }
}

/// The state of one connection.
struct Receiver<'a> {
    queue: &'a Queue,
    appender: &'a mut Appender,
    board: &'a StatusBoard,
    /// Whether the source sends logical messages; otherwise each empty transaction may be a marker.
    sends_markers: bool,
    /// End LSN of what the queue has: a transaction that commits before it came again and is dropped.
    end: Lsn,
    /// The transaction in the making.
    transaction: Option<Transaction>,
    /// A keepalive's position that is newer than the queue's end.
    position: Option<Lsn>,
    position_at: Instant,
}

struct Transaction {
    head: TransactionHead,
    changes: u64,
    repeated: bool,
}

/// What the messages that were read at once have in common.
#[derive(Default)]
struct Run {
    bytes: u64,
    /// What the source's clock said last.
    server_time: Option<i64>,
    /// Whether the source wants to hear from us.
    reply_requested: bool,
}

impl<'a> Receiver<'a> {
    fn new(
        queue: &'a Queue,
        appender: &'a mut Appender,
        board: &'a StatusBoard,
        end: Lsn,
        sends_markers: bool,
    ) -> Receiver<'a> {
        let position_at = Instant::now();
        Receiver { queue, appender, board, sends_markers, end, transaction: None, position: None, position_at }
    }

    async fn run(&mut self, stream: &mut ReplicationStream, server: Server<'_>) -> Result<()> {
        let mut progress = self.queue.subscribe();
        let mut status = tokio::time::interval(STATUS_INTERVAL);
        status.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut confirmed = Lsn::ZERO;
        let mut handed_over = Instant::now();
        let mut is_gathering = false;
        let mut let_be = None;
        let mut rested = LET_BE;
        loop {
            // Back-pressure (I7): while the queue has no room, the socket is not read, and the connection is kept
            // alive by the status messages below.
            let event = async {
                self.appender.ready().await?;
                if let Some(rest) = let_be.take() {
                    if let Some(event) = stream.next().now_or_never() {
                        return event;
                    }
                    // Not the runtime's sleep, during which it would hear of each message.
                    std::thread::sleep(rest);
                }
                stream.next().await
            };
            let event = tokio::select! {
                event = event => Some(event?),
                changed = progress.changed() => {
                    if changed.is_err() {
                        // The writer thread has ended; `ready` says why.
                        self.appender.ready().await?;
                        return Err(Error::new(ErrorKind::Queue, "the queue's writer has ended"));
                    }
                    None
                }
                () = tokio::time::sleep_until(handed_over + GATHER), if is_gathering => {
                    self.appender.flush()?;
                    handed_over = Instant::now();
                    is_gathering = false;
                    continue;
                }
                _ = status.tick() => {
                    self.write_position(true)?;
                    let full = progress.borrow().full;
                    if !full && heard.elapsed() > SILENCE_MAX {
                        return Err(Error::new(
                            ErrorKind::Transient,
                            format!("the source has been silent for {} seconds", heard.elapsed().as_secs()),
                        ));
                    }
                    if full {
                        heard = Instant::now();
                        server.goes_on().await?;
                    }
                    confirmed = self.queue.durable_end();
                    stream.send_status(confirmed, true).await?;
                    None
                }
            };
            if let Some(event) = event {
                let before = std::mem::replace(&mut heard, Instant::now());
                let Run { bytes, reply_requested, .. } = self.take_buffered(event, stream)?;
                let is_busy = heard < before + BUSY + rested;
                rested = if bytes < MUCH_BYTES { LET_BE } else { LET_BE_LONG };
                let_be = is_busy.then_some(rested);
                if !stream.has_buffered() {
                    self.write_position(reply_requested)?;
                    is_gathering = heard < handed_over + GATHER;
                    if !is_gathering {
                        self.appender.flush()?;
                        handed_over = heard;
                    }
                }
                if reply_requested {
                    confirmed = self.queue.durable_end();
                    stream.send_status(confirmed, false).await?;
                }
            } else {
                let durable = self.queue.durable_end();
                if durable > confirmed {
                    confirmed = durable;
                    stream.send_status(confirmed, false).await?;
                }
                progress.mark_unchanged();
                show(self.queue, self.board);
            }
        }
    }

    /// Takes a message and those that have been read with it, without waiting for anything; answers what they have in
    /// common. It is never more than one socket buffer, so that room in the queue need be asked for only once (I7) and
    /// the status messages have their turn.
    fn take_buffered(&mut self, event: StreamEvent, stream: &mut ReplicationStream) -> Result<Run> {
        let mut run = Run::default();
        match event {
            StreamEvent::Data { server_time, data, .. } => self.take_data(&mut run, server_time, &data)?,
            StreamEvent::KeepAlive { wal_end, server_time, reply_requested } => {
                self.take_keepalive(&mut run, wal_end, server_time, reply_requested);
            }
        }
        stream.take_buffered(|event| {
            match event {
                StreamEvent::Data { server_time, data, .. } => return self.take_data(&mut run, server_time, data),
                StreamEvent::KeepAlive { wal_end, server_time, reply_requested } => {
                    self.take_keepalive(&mut run, wal_end, server_time, reply_requested);
                }
            }
            Ok(())
        })?;
        self.board.received_bytes(run.bytes);
        if let Some(server_time) = run.server_time {
            self.board.source_clock(server_time);
        }
        Ok(run)
    }

    fn take_keepalive(&mut self, run: &mut Run, wal_end: Lsn, server_time: i64, reply_requested: bool) {
        self.board.heard_from_source(wal_end, server_time);
        // Everything that commits before this position has been sent, so outside of a transaction it is an end like that
        // of a transaction.
        if self.transaction.is_none() && wal_end > self.end {
            self.position = Some(wal_end);
        }
        run.reply_requested |= reply_requested;
    }

    fn take_data(&mut self, run: &mut Run, server_time: i64, data: &[u8]) -> Result<()> {
        run.server_time = Some(server_time);
        run.bytes += data.len() as u64;
        self.take_message(data)
    }

    fn take_message(&mut self, data: &[u8]) -> Result<()> {
        match data.first() {
            Some(b'B') => {
                let Message::Begin { commit_lsn, commit_time, xid } = decoded(data)? else {
                    return Err(out_of_order(data));
                };
                if self.transaction.is_some() {
                    return Err(out_of_order(data));
                }
                let head = TransactionHead { xid, commit_lsn, commit_time };
                let repeated = commit_lsn < self.end;
                if !repeated {
                    self.appender.begin(head)?;
                }
                self.position = None;
                self.transaction = Some(Transaction { head, changes: 0, repeated });
            }
            Some(b'C') => {
                let Message::Commit { end_lsn, .. } = decoded(data)? else { return Err(out_of_order(data)) };
                let Some(transaction) = self.transaction.take() else { return Err(out_of_order(data)) };
                if !transaction.repeated {
                    if !self.sends_markers && transaction.changes == 0 {
                        let TransactionHead { xid, commit_lsn, .. } = transaction.head;
                        self.appender.data(&marker::of_empty_transaction(xid, commit_lsn))?;
                    }
                    self.appender.commit(end_lsn)?;
                    self.end = end_lsn;
                    self.board.received_transaction(transaction.changes, end_lsn, transaction.head.commit_time);
                }
            }
            Some(kind) => match &mut self.transaction {
                Some(transaction) => {
                    if !transaction.repeated {
                        self.appender.data(data)?;
                        decode::for_each_changed_relation(data, |relid| self.appender.label(relid));
                    }
                    transaction.changes += u64::from(matches!(kind, b'I' | b'U' | b'D' | b'T'));
                }
                // A message outside of a transaction is somebody's non-transactional logical message: not ours, and
                // nothing that a table could hold.
                None if *kind == b'M' => {}
                None => return Err(out_of_order(data)),
            },
            None => return Err(out_of_order(data)),
        }
        Ok(())
    }

    /// Writes the newest keepalive's position to the queue, at most once a second unless `now`.
    fn write_position(&mut self, now: bool) -> Result<()> {
        let due = now || self.position_at.elapsed() >= POSITION_INTERVAL;
        if let Some(position) = self.position.take_if(|_| due) {
            self.appender.position(position)?;
            self.appender.flush()?;
            self.end = position;
            self.position_at = Instant::now();
        }
        Ok(())
    }
}

fn decoded(data: &[u8]) -> Result<Message<'_>> {
    decode::decode(data).map_err(|error| {
        Error::new(ErrorKind::Other, format!("the source sent a message that cannot be read: {error}"))
    })
}

fn out_of_order(data: &[u8]) -> Error {
    let kind = data.first().map_or('?', |kind| char::from(*kind));
    Error::new(ErrorKind::Other, format!("the source sent a message of kind '{kind}' where none can be"))
}

/// A wait that differs between processes, so that they do not all come back at once.
fn jittered(wait: Duration) -> Duration {
    let nanoseconds =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.subsec_nanos());
    wait.mul_f64(0.5 + f64::from(nanoseconds % 1000) / 1000.0)
}
