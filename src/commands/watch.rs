//! `walferry status --watch` on a terminal: asks the migration once a second, and draws what it answers.

use std::io::IsTerminal;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{print, read_status};
use crate::control::{Answer, Conversation, Request};
use crate::error::{Context, Result};
use crate::migrate::stop_signal;
use crate::observe::history::Point;
use crate::observe::render;
use crate::observe::status::Status;
use crate::observe::watch::{Look, Screen, Shown, Signal, draw};
use crate::state_directory::StateDirectory;

/// How often the migration is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// A migration that lives answers sooner.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Whether there is a terminal to draw on, with somebody at its keys.
pub(super) fn is_possible() -> bool {
    std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && !is_dumb()
}

/// Whether the terminal understands nothing but lines.
pub(super) fn is_dumb() -> bool {
    std::env::var_os("TERM").is_none_or(|terminal| terminal.is_empty() || terminal == "dumb")
}

/// Shows how a migration is until somebody leaves; the status that was seen last.
pub(super) async fn watch(directory: &StateDirectory) -> Result<Status> {
    // Without a migration there is nothing to watch; later on it may go away and come back.
    let first = read_status(directory).await?;
    let mut shown = Shown::new(directory.path().display().to_string());
    shown.remember(&remembered(directory).await);
    shown.take(first.clone());
    let look = Look::detect();
    let drawing = || "drawing on the terminal".to_owned();

    let (sender, mut answers) = mpsc::channel(1);
    let mut asking = JoinSet::new();
    asking.spawn(ask(directory.clone(), sender));
    let stopped = stop_signal();
    tokio::pin!(stopped);
    let mut screen = Screen::take().context(drawing)?;
    loop {
        screen.draw(|frame| draw(frame, &shown, look)).context(drawing)?;
        tokio::select! {
            signal = screen.signal() => if signal == Signal::Quit { break },
            Some(answer) = answers.recv() => match answer {
                Ok(status) => shown.take(status),
                Err(why) => shown.take_silence(why),
            },
            _ = &mut stopped => break,
        }
    }
    drop(screen);
    let last = shown.status().cloned().unwrap_or(first);
    print(&format!("{}\n", render::one_line(&last)))?;
    Ok(last)
}

/// The last hour, as the migration that runs remembers it; nothing where none runs, or an older one.
async fn remembered(directory: &StateDirectory) -> Vec<Point> {
    let asked = async { Conversation::begin(directory, &Request::History).await?.next().await };
    match tokio::time::timeout(ANSWER_MAX, asked).await {
        Ok(Ok(Answer::History(points))) => points,
        _ => Vec::new(),
    }
}

async fn ask(directory: StateDirectory, answers: mpsc::Sender<Result<Status, String>>) {
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let answer = match tokio::time::timeout(ANSWER_MAX, read_status(&directory)).await {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("no answer for {} s", ANSWER_MAX.as_secs())),
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}
