//! The terminal while the view is on it: taken on the way in, given back on every way out.

use std::io;
use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, Frame};
use tokio::sync::mpsc;

/// How soon the thread that waits for keys sees that nobody wants them any more.
const POLL: Duration = Duration::from_millis(200);

/// What came from the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Somebody wants to leave, or the terminal is gone.
    Quit,
    /// It has another size, or is to be drawn again.
    Redraw,
}

/// The whole terminal, on its other screen. When it is dropped, or anything panics, the terminal is as it was before.
pub struct Screen {
    terminal: DefaultTerminal,
    signals: mpsc::Receiver<Signal>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// When it is none, or refuses.
    pub fn take() -> io::Result<Screen> {
        // It also has a panic give the terminal back, before it says what happened.
        let terminal = ratatui::try_init()?;
        let (sender, signals) = mpsc::channel(16);
        let screen = Screen { terminal, signals };
        std::thread::Builder::new().name("keys".into()).spawn(move || listen(&sender))?;
        Ok(screen)
    }

    /// Draws a picture.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn draw(&mut self, picture: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        self.terminal.draw(picture).map(|_| ())
    }

    /// What comes next from the terminal.
    pub async fn signal(&mut self) -> Signal {
        // The thread ends only with the terminal.
        self.signals.recv().await.unwrap_or(Signal::Quit)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _ = ratatui::try_restore();
    }
}

fn listen(sender: &mpsc::Sender<Signal>) {
    while !sender.is_closed() {
        let signal = match event::poll(POLL).and_then(|some| if some { event::read().map(Some) } else { Ok(None) }) {
            Ok(None) => continue,
            Ok(Some(event)) => meaning(&event),
            Err(_) => Some(Signal::Quit),
        };
        if let Some(signal) = signal
            && (sender.blocking_send(signal).is_err() || signal == Signal::Quit)
        {
            return;
        }
    }
}

fn meaning(event: &Event) -> Option<Signal> {
    match event {
        Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) => match code {
            KeyCode::Char('q' | 'Q') | KeyCode::Esc => Some(Signal::Quit),
            KeyCode::Char('c' | 'd') if modifiers.contains(KeyModifiers::CONTROL) => Some(Signal::Quit),
            _ => Some(Signal::Redraw),
        },
        Event::Resize(..) | Event::FocusGained => Some(Signal::Redraw),
        _ => None,
    }
}
