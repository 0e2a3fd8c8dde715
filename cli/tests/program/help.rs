use crate::support::run;

fn help(arguments: &[&str]) -> String {
    let ran = run(arguments);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    ran.stdout
}

/// The commands that a help lists.
fn commands(help: &str) -> Vec<String> {
    let list = help.split_once("\nCommands:\n").map_or("", |(_, rest)| rest);
    list.lines()
        .take_while(|line| !line.is_empty())
        // What goes on from the line above is further to the right.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

fn review(path: &[&str]) -> usize {
    let help = help(&[path, &["--help"]].concat());
    let name = if path.is_empty() {
        "hoist".into()
    } else {
        path.join("_")
    };
    insta::assert_snapshot!(name, help);
    commands(&help)
        .iter()
        .map(|command| review(&[path, &[command.as_str()]].concat()))
        .sum::<usize>()
        + 1
}

#[test]
fn help_of_every_command_is_as_reviewed() {
    assert!(review(&[]) > 20);
}

#[test]
fn a_wrong_command_line_is_code_2_and_prints_no_data() {
    for arguments in [
        &[][..],
        &["hoist"],
        &["load", "--context", "0"],
        &["load", "--sequences", "-1"],
        &["load", "--memory", "3 parsecs"],
        &["load", "--trace-layers", "5-4"],
        &["load", "--no-workspace", "--context", "5"],
        &["load", "a", "b"],
        &["bench", "load", "--runs", "4"],
        &["completions", "cmd.exe"],
    ] {
        let ran = run(arguments);
        assert_eq!(ran.code, Some(2), "{arguments:?}");
        assert_eq!(ran.stdout, "", "{arguments:?}");
        assert!(!ran.stderr.is_empty());
    }
}

#[test]
fn every_shell_gets_completions_that_know_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = help(&["completions", shell]);
        for word in ["inspect", "load", "trace-layers"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}
