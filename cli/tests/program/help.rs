use crate::support::run;

fn help(arguments: &[&str]) -> String {
    let ran = run(arguments);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    ran.stdout
}

#[test]
fn help_of_every_command_is_as_reviewed() {
    insta::assert_snapshot!("hoist", help(&["--help"]));
    for command in ["inspect", "plan", "load", "devices", "completions"] {
        insta::assert_snapshot!(command, help(&[command, "--help"]));
    }
    insta::assert_snapshot!("bench_load", help(&["bench", "load", "--help"]));
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
