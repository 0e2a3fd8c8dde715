//! Options that contradict each other, or change nothing.

use crate::bad_input::refused;
use crate::support::run;

#[test]
fn an_option_that_would_change_nothing_is_refused() {
    for (arguments, says) in [
        (
            &["load", "--probe-limit", "5"][..],
            "--probe-limit is for plugins",
        ),
        (
            &["load", "--backend", "plugin:name", "--probe-limit", "5"],
            "--probe-limit is for plugins",
        ),
        (&["load", "--isolate"], "--isolate is for plugins"),
        (&["inspect", "--context", "5"], "are for --program"),
        (&["inspect", "--sequences", "2"], "are for --program"),
        (&["inspect", "--batch-tokens", "5"], "are for --program"),
        (&["inspect", "--program", "--full"], "cannot be used with"),
        (&["synth", "--list", "tiny-llama", "x"], "cannot be used with"),
        (
            &["generate", "-p", "x", "--sequences", "2"],
            "unexpected argument",
        ),
        (
            &["logits", "--tokens", "1", "--batch-tokens", "5"],
            "unexpected argument",
        ),
        (
            &["logits", "--tokens", "1", "--sequences", "1"],
            "unexpected argument",
        ),
        (
            &["perplexity", "model", "text", "--batch-tokens", "5"],
            "unexpected argument",
        ),
        (&["bench", "decode", "--sequences", "1"], "unexpected argument"),
    ] {
        let ran = run(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(ran.stderr.contains(says), "{arguments:?}: {}", ran.stderr);
    }
    assert_eq!(run(&["inspect", "--program", "--context", "5"]).code, Some(0));
}

#[test]
fn what_a_greedy_choice_ignores_is_noted() {
    let generate = |options: &[&str]| run(&[&["generate", "-p", "x", "-n", "1"], options].concat());
    let ran = generate(&["--top-k", "5", "--seed", "3"]);
    assert_eq!(ran.code, Some(0));
    assert_eq!(
        ran.stderr,
        "note: --top-k, --seed without effect: nothing is drawn at a --temp of 0\n"
    );
    assert!(
        generate(&["--repeat-window", "5"])
            .stderr
            .contains("no --repeat-penalty")
    );
    assert_eq!(
        generate(&["--temp", "1", "--top-k", "5", "--seed", "3"]).stderr,
        ""
    );
}

#[test]
fn a_negative_number_is_told_from_an_option() {
    for option in ["--temp", "--top-p", "--min-p", "--repeat-penalty"] {
        refused(&run(&["generate", "-p", "x", option, "-1"]), 2, &["and is -1"]);
    }
}

#[test]
fn a_window_of_one_token_predicts_nothing() {
    let (_folder, path) = crate::support::on_disk(&hoist_tests::files::ModelFiles::single(
        "text",
        b"In the beginning".to_vec(),
    ));
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny-kjv.gguf");
    let text = path.to_str().unwrap();
    refused(
        &run(&["perplexity", model, text, "--context", "1"]),
        2,
        &["a context of 1 leaves nothing to predict"],
    );
    assert_eq!(run(&["perplexity", model, text, "--context", "2"]).code, Some(0));
    refused(
        &run(&["perplexity", model, "/dev/zero"]),
        2,
        &["more than", "bytes"],
    );
}
