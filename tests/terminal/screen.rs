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
        let sized = format!("stty rows {ROWS} cols {COLUMNS}; {command}; echo \"ended with $?\"");
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
        Terminal { script, keys, written }
    }

    pub fn press(&mut self, keys: &str) {
        let keyboard = self.keys.as_mut().unwrap();
        keyboard.write_all(keys.as_bytes()).unwrap();
        keyboard.flush().unwrap();
    }

    /// Everything that was written to the terminal.
    pub fn written(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.written).unwrap_or_default()).into_owned()
    }

    /// What stands on it now.
    pub fn shown(&self) -> String {
        Screen::of(&self.written()).lines.iter().map(|line| line.iter().collect::<String>() + "\n").collect()
    }
}

/// What is on a terminal after this was written to it; as much of a terminal as the view needs.
struct Screen {
    lines: Vec<Vec<char>>,
    row: usize,
    column: usize,
}

impl Screen {
    fn of(written: &str) -> Screen {
        let mut screen = Screen { lines: vec![vec![' '; COLUMNS]; ROWS], row: 0, column: 0 };
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
                '\n' => screen.row = (screen.row + 1).min(ROWS - 1),
                '\r' => screen.column = 0,
                letter if letter.is_control() => {}
                letter => {
                    if screen.column < COLUMNS {
                        screen.lines[screen.row][screen.column] = letter;
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
                self.row = number(0).unwrap_or(1).clamp(1, ROWS) - 1;
                self.column = number(1).unwrap_or(1).clamp(1, COLUMNS) - 1;
            }
            'J' => self.lines = vec![vec![' '; COLUMNS]; ROWS],
            _ => {}
        }
    }
}
