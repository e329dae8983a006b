//! The control socket: how `status`, `cutover` and others speak to the running `migrate`.
//!
//! A Unix socket in the state directory, mode 0600: whoever may read the directory may steer the migration, and nobody
//! else. A request is one line of JSON; the answers are lines of JSON, the last of which has `result` or `error`.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::care::tune::{self, Tune, Tuned};
use crate::cutover;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::observe::board::StatusBoard;
use crate::observe::history::Point;
use crate::observe::status::{Phase, Status};
use crate::pause::{Pause, Paused, What};
use crate::state_directory::StateDirectory;
use crate::verify::point::CommonPoint;

/// A cutover that has begun answers by itself when its time is over.
const BEGIN_GRACE: Duration = Duration::from_secs(5);

/// What can be asked of a running migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Request {
    /// How it is.
    Status,
    /// How it was in the last hour, for plots.
    History,
    /// Switch over to the target, or back.
    Cutover(cutover::Options),
    /// End the way back.
    Finish,
    /// Look at everything that a cutover would, and touch nothing.
    Rehearse(cutover::Options),
    /// Hold something, or let it go on.
    Pause {
        /// What.
        what: What,
        /// Hold it.
        rest: bool,
    },
    /// Change how it is copied.
    Tune(tune::Change),
    /// Take a point at which both sides can be compared, and keep its snapshots for as long as this conversation lasts.
    TakePoint,
    /// Compare tables with the source again, and copy what differs.
    Repair {
        /// As `schema.name`.
        tables: Vec<String>,
    },
}

/// One line of an answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How it is; the last line.
    Status(Box<Status>),
    /// How it was, oldest first; the last line.
    History(Vec<Point>),
    /// A step of a cutover is done; more lines follow.
    Step(cutover::Step),
    /// The cutover went through; the last line.
    CutOver(cutover::Outcome),
    /// The way back has ended; the last line.
    Finished,
    /// What a rehearsal found; the last line.
    Rehearsed(cutover::Rehearsal),
    /// What rests now; the last line.
    Paused(Paused),
    /// How it is copied now; the last line.
    Tuned(Tuned),
    /// Why it takes longer; more lines follow.
    Waits(String),
    /// The point; another line comes only if its snapshots are lost.
    Point(CommonPoint),
    /// The ledger says what is to be compared again, and the copy is about to begin; the last line.
    Repairing,
    /// It did not work; the last line.
    Error {
        /// [`ErrorKind::exit_code`].
        exit_code: u8,
        /// What happened.
        message: String,
        /// What to do next.
        hint: Option<String>,
    },
}

impl From<&Error> for Answer {
    fn from(error: &Error) -> Answer {
        Answer::Error {
            exit_code: error.kind().exit_code(),
            message: error.to_string(),
            hint: error.next_step().map(str::to_owned),
        }
    }
}

/// An operator's request for a cutover, on its way to the migration.
pub struct CutoverRequest {
    /// How it is to be done.
    pub options: cutover::Options,
    /// Nothing is to be touched.
    pub dry_run: bool,
    /// Where the steps and the outcome go.
    pub answers: mpsc::UnboundedSender<Answer>,
}

/// A request for a common point, on its way to the migration. Whoever asked is gone when the answers' channel is closed.
pub struct PointRequest {
    /// Where the point goes.
    pub answers: mpsc::UnboundedSender<Answer>,
}

/// A request to bring tables right again, on its way to the migration.
pub struct RepairRequest {
    /// As `schema.name`.
    pub tables: Vec<String>,
    /// Where the outcome goes.
    pub answers: mpsc::UnboundedSender<Answer>,
}

/// An operator's request to end the way back.
pub struct FinishRequest {
    /// Where the outcome goes.
    pub answers: mpsc::UnboundedSender<Answer>,
}

/// Where requests go that the control server cannot answer by itself.
#[derive(Clone)]
pub struct Senders {
    /// Cutovers, one at a time.
    pub cutovers: mpsc::Sender<CutoverRequest>,
    /// Common points, taken one after the other.
    pub points: mpsc::Sender<PointRequest>,
    /// Repairs, one at a time.
    pub repairs: mpsc::Sender<RepairRequest>,
    /// Ends of the way back, one at a time.
    pub finishes: mpsc::Sender<FinishRequest>,
}

/// The other ends of [`Senders`], for the migration in either direction.
pub struct Requests {
    /// Cutovers.
    pub cutovers: mpsc::Receiver<CutoverRequest>,
    /// Common points.
    pub points: mpsc::Receiver<PointRequest>,
    /// Repairs.
    pub repairs: mpsc::Receiver<RepairRequest>,
}

/// The way of requests from the control server to the migration. Those to end the way back come apart from the others.
pub fn requests() -> (Senders, Requests, mpsc::Receiver<FinishRequest>) {
    let (to_cutovers, cutovers) = mpsc::channel(1);
    let (to_points, points) = mpsc::channel(4);
    let (to_repairs, repairs) = mpsc::channel(1);
    let (to_finishes, finishes) = mpsc::channel(1);
    let senders = Senders { cutovers: to_cutovers, points: to_points, repairs: to_repairs, finishes: to_finishes };
    (senders, Requests { cutovers, points, repairs }, finishes)
}

/// Answers requests until it is dropped.
pub struct ControlServer {
    _connections: JoinSet<()>,
    socket: PathBuf,
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl ControlServer {
    /// Listens in a state directory that this process has locked.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(
        directory: &StateDirectory,
        board: StatusBoard,
        pause: Pause,
        tune: Tune,
        senders: Senders,
    ) -> Result<ControlServer> {
        let socket = directory.socket();
        let _ = std::fs::remove_file(&socket);
        let listener = short_path(&socket, |path| UnixListener::bind(path))?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))
            .context(|| format!("protecting {}", socket.display()))?;
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut running = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                // The ended ones are taken out, so that they do not pile up.
                while running.try_join_next().is_some() {}
                let (board, pause, tune, senders) = (board.clone(), pause.clone(), tune.clone(), senders.clone());
                running.spawn(async move {
                    if let Err(error) = serve(stream, &board, &pause, &tune, &senders).await {
                        tracing::debug!(%error, "a control connection ended early");
                    }
                });
            }
        });
        Ok(ControlServer { _connections: connections, socket })
    }
}

async fn serve(stream: UnixStream, board: &StatusBoard, pause: &Pause, tune: &Tune, senders: &Senders) -> Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    reader.read_line(&mut line).await?;
    let request: Request = match serde_json::from_str(&line) {
        Ok(request) => request,
        Err(error) => {
            let error = Error::new(ErrorKind::Usage, format!("this walferry does not know that request: {error}"));
            return send(&mut writer, &Answer::from(&error)).await;
        }
    };
    match request {
        Request::Status => send(&mut writer, &Answer::Status(Box::new(board.snapshot()))).await,
        Request::History => send(&mut writer, &Answer::History(board.history())).await,
        Request::Pause { what, rest } => {
            let answer = pause.set(what, rest).map_or_else(|error| Answer::from(&error), Answer::Paused);
            send(&mut writer, &answer).await
        }
        Request::Tune(change) => {
            let answer = tune.change(change).map_or_else(|error| Answer::from(&error), Answer::Tuned);
            send(&mut writer, &answer).await
        }
        Request::Cutover(options) => cut_over(options, false, (reader, writer), board, senders).await,
        Request::Rehearse(options) => cut_over(options, true, (reader, writer), board, senders).await,
        Request::TakePoint => {
            if let Err(error) = is_prepared(board, "compared while writes go on") {
                return send(&mut writer, &Answer::from(&error)).await;
            }
            let (answers, mut received) = mpsc::unbounded_channel();
            if senders.points.try_send(PointRequest { answers }).is_err() {
                let error = Error::new(ErrorKind::Blocked, "other comparisons are waiting for their turn");
                return send(&mut writer, &Answer::from(&error)).await;
            }
            let mut rest = String::new();
            loop {
                tokio::select! {
                    answer = received.recv() => match answer {
                        Some(answer) => send(&mut writer, &answer).await?,
                        None => return Ok(()),
                    },
                    // Nothing more is asked: it has ended. With `received` goes the point.
                    _ = reader.read_line(&mut rest) => return Ok(()),
                }
            }
        }
        Request::Repair { tables } => {
            if let Err(error) = is_prepared(board, "repaired") {
                return send(&mut writer, &Answer::from(&error)).await;
            }
            let (answers, mut received) = mpsc::unbounded_channel();
            if senders.repairs.try_send(RepairRequest { tables, answers }).is_err() {
                let error = Error::new(ErrorKind::Blocked, "another repair is waiting for its turn");
                return send(&mut writer, &Answer::from(&error)).await;
            }
            match received.recv().await {
                Some(answer) => send(&mut writer, &answer).await,
                None => Ok(()),
            }
        }
        Request::Finish => {
            let (answers, mut received) = mpsc::unbounded_channel();
            if senders.finishes.try_send(FinishRequest { answers }).is_err() {
                let error = Error::new(ErrorKind::Blocked, "the way back is being ended already");
                return send(&mut writer, &Answer::from(&error)).await;
            }
            match received.recv().await {
                Some(answer) => send(&mut writer, &answer).await,
                None => Ok(()),
            }
        }
    }
}

/// Passes a cutover or its rehearsal on, and what comes of it back.
async fn cut_over(
    options: cutover::Options,
    dry_run: bool,
    (mut reader, mut writer): (BufReader<OwnedReadHalf>, OwnedWriteHalf),
    board: &StatusBoard,
    senders: &Senders,
) -> Result<()> {
    let limit = Duration::try_from_secs_f64(options.timeout_seconds).unwrap_or(Duration::MAX);
    if let Err(error) = may_be_cut_over(board, options.back) {
        return send(&mut writer, &Answer::from(&error)).await;
    }
    let (answers, mut received) = mpsc::unbounded_channel();
    if senders.cutovers.try_send(CutoverRequest { options, dry_run, answers }).is_err() {
        let error = Error::new(ErrorKind::Aborted, "another cutover is running");
        return send(&mut writer, &Answer::from(&error)).await;
    }
    // Until it begins, whoever asked can change their mind: with `received` goes the request.
    let mut rest = String::new();
    let begins = tokio::time::sleep(limit.saturating_add(BEGIN_GRACE));
    tokio::pin!(begins);
    let mut begun = false;
    loop {
        tokio::select! {
            biased;
            answer = received.recv() => {
                let Some(answer) = answer else { return Ok(()) };
                send(&mut writer, &answer).await?;
                if !matches!(answer, Answer::Step(_)) {
                    return Ok(());
                }
                begun = true;
            }
            _ = reader.read_line(&mut rest), if !begun => return Ok(()),
            () = &mut begins, if !begun && board.phase() != Phase::CuttingOver => {
                let error = Error::new(ErrorKind::Aborted, "it could not begin within --timeout")
                    .hint("Nothing was touched. `walferry status` says what the migration waits for.");
                return send(&mut writer, &Answer::from(&error)).await;
            }
        }
    }
}

/// A request that could only wait is refused: it would be carried out when nobody looks any more.
fn may_be_cut_over(board: &StatusBoard, back: bool) -> Result<()> {
    let phase = board.phase();
    let (text, hint) = match phase {
        Phase::Following => return Ok(()),
        Phase::CuttingOver => ("another cutover is running".to_owned(), "Wait for its end."),
        _ if back && !board.is_turned_back() => (
            "there is nothing to switch back from: no cutover has been done".to_owned(),
            "`walferry status` shows where the migration is; `walferry cutover` switches when it follows.",
        ),
        _ if !back && board.is_turned_back() => (
            "this migration has been cut over already".to_owned(),
            "`walferry switchback` switches back to the old primary; `walferry finish` ends the way back.",
        ),
        _ => (
            format!("the migration does not follow yet: it is {}", phase.title()),
            "Nothing was touched. Ask again when `walferry status` says that the cutover is ready; it also says how long that may take.",
        ),
    };
    Err(Error::new(ErrorKind::Aborted, text).hint(hint))
}

/// While it prepares nobody takes such a request yet: whoever asks would wait for the whole copy.
fn is_prepared(board: &StatusBoard, what: &str) -> Result<()> {
    if board.phase() != Phase::Preparing || board.is_turned_back() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Blocked, format!("the migration is preparing: only one that follows can be {what}"))
        .hint("`walferry status` says what it waits for."))
}

async fn send(writer: &mut OwnedWriteHalf, answer: &Answer) -> Result<()> {
    let mut line = serde_json::to_vec(answer).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    Ok(())
}

/// A conversation with a running migration.
pub struct Conversation {
    lines: tokio::io::Lines<BufReader<UnixStream>>,
}

impl Conversation {
    /// Asks.
    ///
    /// # Errors
    /// `Other` when no migration runs in the directory.
    pub async fn begin(directory: &StateDirectory, request: &Request) -> Result<Conversation> {
        let socket = directory.socket();
        let stream = short_path(&socket, |path| std::os::unix::net::UnixStream::connect(path)).and_then(|stream| {
            stream.set_nonblocking(true)?;
            Ok(UnixStream::from_std(stream)?)
        });
        let mut stream = stream.map_err(|_| {
            Error::new(ErrorKind::Other, format!("no migration is running in {}", directory.path().display()))
                .hint(how_to_start(directory))
        })?;
        let mut line = serde_json::to_vec(request).map_err(|error| Error::new(ErrorKind::Other, error.to_string()))?;
        line.push(b'\n');
        stream.write_all(&line).await?;
        Ok(Conversation { lines: BufReader::new(stream).lines() })
    }

    /// The next line; an [`Answer::Error`] becomes an error.
    ///
    /// # Errors
    /// What the migration answered, or `Other` when it ended in the middle.
    pub async fn next(&mut self) -> Result<Answer> {
        let Some(line) = self.lines.next_line().await? else {
            return Err(Error::new(ErrorKind::Other, "the migration ended before it had answered")
                .hint("Look at its log; `walferry migrate` with the same options goes on where it was."));
        };
        let answer = serde_json::from_str(&line)
            .map_err(|error| Error::new(ErrorKind::Other, format!("the migration's answer cannot be read: {error}")))?;
        match answer {
            Answer::Error { exit_code, message, hint } => {
                let kinds = [
                    ErrorKind::Usage,
                    ErrorKind::Blocked,
                    ErrorKind::Different,
                    ErrorKind::Aborted,
                    ErrorKind::Interrupted,
                ];
                let kind = kinds.into_iter().find(|kind| kind.exit_code() == exit_code).unwrap_or(ErrorKind::Other);
                let error = Error::new(kind, message);
                Err(match hint {
                    Some(hint) => error.hint(hint),
                    None => error,
                })
            }
            answer => Ok(answer),
        }
    }
}

fn how_to_start(directory: &StateDirectory) -> String {
    let path = directory.path().display();
    match directory.identity() {
        Ok(None) => format!(
            "There is no migration in that directory: is --dir right? To begin one: walferry migrate --source … --target … --dir {path}"
        ),
        _ => format!(
            "Go on with it, with the options that it was begun with: walferry migrate --source … --target … --dir {path}"
        ),
    }
}

/// A socket's path may have 107 bytes at most (unix(7)), a directory's may be longer: it is reached through its descriptor.
fn short_path<T>(socket: &Path, act: impl FnOnce(&Path) -> std::io::Result<T>) -> Result<T> {
    let doing = || format!("opening the control socket {}", socket.display());
    let (Some(directory), Some(name)) = (socket.parent(), socket.file_name()) else {
        return act(socket).context(doing);
    };
    let directory = std::fs::File::open(directory).context(doing)?;
    let through = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    act(&through).context(doing)
}
