//! `walferry config example`: a settings file with every key, made from the options themselves.

use clap::{Arg, Command};

use super::{VARIABLE, commands, commands_with, is_flag, is_list, is_shared, options, parse};

const WIDTH: usize = 110;

/// What could stand where an option has no default, by the name of its value.
const SAMPLES: [(&str, &str); 17] = [
    ("SOURCE", "postgres://app@old/shop"),
    ("TARGET", "postgres://app@new/shop"),
    ("DIR", "/var/lib/walferry/shop"),
    ("SIZE", "50MiB"),
    ("DURATION", "30s"),
    ("TIME", "2026-11-21T02:00:00Z"),
    ("PERCENT", "10%"),
    ("N", "4"),
    ("TABLE", "public.orders"),
    ("TABLES", "public.orders"),
    ("PATTERN", "public.*"),
    ("OLD=NEW", "old=new"),
    ("COMMAND", "/usr/local/bin/a-command"),
    ("OBJECT", "role admin"),
    ("NAME", "shop"),
    ("FILE", "/etc/pgbouncer/shop.ini"),
    ("URL", "postgres://admin@pooler:6432"),
];

/// The text of the file: everything is commented out.
pub fn example(program: &Command) -> String {
    let mut text = format!(
        "# Settings of walferry {}, read with --config walferry.toml or {VARIABLE}=walferry.toml; `walferry config check` looks at it.\n\
         # Each key is an option of the command line without its dashes. The environment wins over this file, and the command line\n\
         # over both (--flag=false there takes back a flag of this file; a list there replaces the list of this file).\n\
         # At the top stands what several commands share, for every command that has it. A [table] is for one command, and wins over\n\
         # the top; what is shared may stand there too. Passwords belong elsewhere: ~/.pgpass, or a password command.\n",
        program.get_version().unwrap_or_default()
    );
    let mut told: Vec<String> = Vec::new();
    for command in commands(program) {
        for option in options(program, command) {
            let long = option.get_long().unwrap_or_default();
            if is_shared(program, long) && !told.iter().any(|known| known == long) {
                let with = commands_with(program, long);
                let all = with.len() == commands(program).count();
                let whom = if all { "every command".to_owned() } else { with.join(", ") };
                describe(&mut text, option, Some(&whom));
                told.push(long.to_owned());
            }
        }
    }
    for command in commands(program) {
        let about = command.get_about().map(ToString::to_string).unwrap_or_default();
        text.push('\n');
        wrapped(&mut text, &about);
        text.push_str(&format!("[{}]\n", command.get_name()));
        for option in
            options(program, command).filter(|option| !told.iter().any(|known| option.get_long() == Some(known)))
        {
            describe(&mut text, option, None);
        }
    }
    text
}

fn describe(text: &mut String, option: &Arg, for_whom: Option<&str>) {
    text.push('\n');
    let mut help = option.get_help().map(ToString::to_string).unwrap_or_default();
    let possible: Vec<String> = option.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if !is_flag(option) && !possible.is_empty() {
        help.push_str(&format!(" [one of: {}]", possible.join(", ")));
    }
    if let Some(variable) = option.get_env() {
        help.push_str(&format!(" [environment: {}]", variable.to_string_lossy()));
    }
    wrapped(text, &help);
    if let Some(whom) = for_whom {
        wrapped(text, &format!("For {whom}."));
    }
    let value = if is_flag(option) { "true".to_owned() } else { literal(option, &sample(option)) };
    text.push_str(&format!("#{} = {value}\n", option.get_long().unwrap_or_default()));
}

/// What an option would be without the file, or else something that it takes.
fn sample(option: &Arg) -> String {
    if let Some(default) = option.get_default_values().first() {
        return default.to_string_lossy().into_owned();
    }
    let value_name =
        option.get_value_names().and_then(|names| names.first()).map(|name| name.to_string()).unwrap_or_default();
    let by_name = SAMPLES.iter().filter(|(name, _)| *name == value_name);
    if option.get_id() == "hypertables" {
        // Read when it is given, so none can be tried here.
        return "hypertables.toml".to_owned();
    }
    let candidates = by_name.chain(&SAMPLES).map(|(_, sample)| (*sample).to_owned());
    let possible = option.get_possible_values().first().map(|value| value.get_name().to_owned());
    possible.into_iter().chain(candidates).find(|candidate| parse(option, candidate).is_ok()).unwrap_or_default()
}

fn literal(option: &Arg, value: &str) -> String {
    let plain = value.parse::<i64>().is_ok();
    let text = if plain { value.to_owned() } else { toml::Value::from(value).to_string() };
    if is_list(option) {
        format!("[{}]", if plain { toml::Value::from(value).to_string() } else { text })
    } else {
        text
    }
}

fn wrapped(text: &mut String, words: &str) {
    let mut width = 0;
    for word in words.split_whitespace() {
        let length = word.chars().count();
        if width == 0 || width + 1 + length > WIDTH {
            text.push_str(if width == 0 { "# " } else { "\n# " });
            width = 2;
        } else {
            text.push(' ');
            width += 1;
        }
        text.push_str(word);
        width += length;
    }
    if width > 0 {
        text.push('\n');
    }
}
