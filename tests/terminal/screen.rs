//! A terminal for a program that draws on one: a real pseudo terminal, and what stands on its screen.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

pub const COLUMNS: usize = 110;
pub const ROWS: usize = 34;

/// A program on a terminal of its own, by `script` of util-linux; ended when it is dropped.
pub struct Terminal {
    script: Child,
    keys: Option<ChildStdin>,
    written: PathBuf,
    /// Columns and rows.
    size: (usize, usize),
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // With its keyboard gone it ends; what it draws goes nowhere then.
        drop(self.keys.take());
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

impl Terminal {
    /// Starts a command line of the shell, with variables.
    pub fn start(command: &str, variables: &[(&str, &str)], files: &std::path::Path) -> Terminal {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let written = files.join(format!("screen-{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        let device = written.with_extension("tty");
        let sized =
            format!("tty > '{}'; stty rows {ROWS} cols {COLUMNS}; {command}; echo \"ended with $?\"", device.display());
        let mut script = Command::new("script")
            .args(["-qfc", &sized])
            .arg(&written)
            .env("TERM", "xterm-256color")
            .env("SHELL", "/bin/sh")
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(File::create(files.join("script.out")).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let keys = script.stdin.take();
        Terminal { script, keys, written, size: (COLUMNS, ROWS) }
    }

    pub fn press(&mut self, keys: &str) {
        let keyboard = self.keys.as_mut().unwrap();
        keyboard.write_all(keys.as_bytes()).unwrap();
        keyboard.flush().unwrap();
    }

    /// Gives it another size, as somebody does who pulls at the window; the program is told.
    pub fn resize(&mut self, columns: usize, rows: usize) {
        let device = std::fs::read_to_string(self.written.with_extension("tty")).unwrap();
        let size = ["rows", &rows.to_string(), "cols", &columns.to_string()].map(str::to_owned);
        assert!(Command::new("stty").args(["-F", device.trim()]).args(size).status().unwrap().success());
        self.size = (columns, rows);
    }

    /// Everything that was written to the terminal.
    pub fn written(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.written).unwrap_or_default()).into_owned()
    }

    /// What stands on it now.
    pub fn shown(&self) -> String {
        self.screen().text()
    }

    /// What stands on it now, cell by cell.
    pub fn screen(&self) -> Screen {
        Screen::of(&self.written(), self.size)
    }
}

/// A place on the screen.
#[derive(Clone, Copy, PartialEq)]
pub struct Cell {
    pub symbol: char,
    /// One of the terminal's 16 colours, where it is not its own.
    pub colour: Option<u8>,
    pub bold: bool,
}

const EMPTY: Cell = Cell { symbol: ' ', colour: None, bold: false };

/// What is on a terminal after this was written to it; as much of a terminal as the view needs.
pub struct Screen {
    pub lines: Vec<Vec<Cell>>,
    row: usize,
    column: usize,
    pen: Cell,
}

impl Screen {
    fn of(written: &str, (columns, rows): (usize, usize)) -> Screen {
        let mut screen = Screen { lines: vec![vec![EMPTY; columns]; rows], row: 0, column: 0, pen: EMPTY };
        let mut letters = written.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '\x1b' if letters.peek() == Some(&'[') => {
                    letters.next();
                    let mut parameters = String::new();
                    // A sequence can be cut off at the end of what is written by now.
                    for next in letters.by_ref() {
                        if ('@'..='~').contains(&next) {
                            screen.obey(next, &parameters);
                            break;
                        }
                        parameters.push(next);
                    }
                }
                '\n' => screen.row = (screen.row + 1).min(rows - 1),
                '\r' => screen.column = 0,
                letter if letter.is_control() => {}
                letter => {
                    // What was drawn for another size may be outside of this one.
                    if let Some(cell) = screen.lines.get_mut(screen.row).and_then(|line| line.get_mut(screen.column)) {
                        *cell = Cell { symbol: letter, ..screen.pen };
                    }
                    screen.column += 1;
                }
            }
        }
        screen
    }

    fn obey(&mut self, command: char, parameters: &str) {
        let number = |place: usize| parameters.split(';').nth(place).and_then(|text| text.parse::<usize>().ok());
        match command {
            'H' => {
                self.row = number(0).unwrap_or(1).max(1) - 1;
                self.column = number(1).unwrap_or(1).max(1) - 1;
            }
            'J' => self.lines.iter_mut().for_each(|line| line.fill(EMPTY)),
            'm' => self.dip(parameters),
            _ => {}
        }
    }

    /// Select graphic rendition: colours and weight.
    fn dip(&mut self, parameters: &str) {
        let mut codes = parameters.split(';').map(|code| code.parse::<u8>().unwrap_or(0));
        while let Some(code) = codes.next() {
            match code {
                0 => self.pen = EMPTY,
                1 => self.pen.bold = true,
                22 => self.pen.bold = false,
                30..=37 => self.pen.colour = Some(code - 30),
                90..=97 => self.pen.colour = Some(code - 82),
                38 => self.pen.colour = codes.nth(1),
                39 => self.pen.colour = None,
                48 => drop(codes.nth(1)),
                _ => {}
            }
        }
    }

    fn text(&self) -> String {
        self.lines.iter().map(|line| line.iter().map(|cell| cell.symbol).collect::<String>() + "\n").collect()
    }
}

/// What [`a_view_that_panics_gives_the_terminal_back`] runs on a terminal.
#[test]
#[ignore = "it panics: another test runs it on a terminal of its own"]
fn a_view_that_panics() {
    let mut screen = walferry::observe::watch::Screen::take().unwrap();
    screen.draw(|frame| frame.render_widget("drawn", frame.area())).unwrap();
    panic!("in the middle of a picture");
}

#[tokio::test]
async fn a_view_that_panics_gives_the_terminal_back() {
    let files = tempfile::tempdir().unwrap();
    let tests = std::env::current_exe().unwrap();
    let command = format!("'{}' --ignored --exact screen::a_view_that_panics --nocapture", tests.display());
    let terminal = Terminal::start(&command, &[], files.path());
    let written = crate::support::until("the view has ended", || {
        let written = terminal.written();
        async move { written.contains("ended with 101").then_some(written) }
    })
    .await;
    let place = |text: &str| written.find(text).unwrap_or_else(|| panic!("no {text:?} in {written:?}"));
    let (entered, left, said) = (place("\x1b[?1049h"), place("\x1b[?1049l"), place("in the middle of a picture"));
    assert!(entered < place("drawn") && left < said, "what it says has to be readable: {written:?}");
    assert!(written.rfind("\x1b[?25h") > Some(said), "the cursor is back: {written:?}");
}
