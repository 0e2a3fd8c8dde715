//! Chat templates: the same text as Python's jinja2 makes (`scripts/text/render_templates.py`), and bounds on hostile ones.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::time::{Duration, Instant, UNIX_EPOCH};

use hoist_text::{ChatMessage, ChatTemplate, Error, MAX_PROMPT_BYTES, RenderOptions};
use serde_json::Value;

fn options(now: u64, add_generation_prompt: bool) -> RenderOptions<'static> {
    RenderOptions {
        add_generation_prompt,
        bos: Some("<s>"),
        eos: Some("</s>"),
        now: UNIX_EPOCH + Duration::from_secs(now),
    }
}

fn render(template: &str) -> Result<String, Error> {
    let messages = [ChatMessage::new("user", "hello")];
    ChatTemplate::new(template)?.render(&messages, &options(0, true))
}

#[test]
fn templates_render_as_jinja2_renders_them() {
    let golden: Value = serde_json::from_str(include_str!("data/chat.json")).unwrap();
    let now = golden["now"].as_u64().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(golden["templates"][name].as_str().unwrap()).unwrap();
        let messages: Vec<ChatMessage> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| ChatMessage::new(m["role"].as_str().unwrap(), m["content"].as_str().unwrap()))
            .collect();
        let add = case["add_generation_prompt"].as_bool().unwrap();
        let found = template.render(&messages, &options(now, add));
        match (case["rendered"].as_str(), found) {
            (Some(expected), Ok(found)) => assert_eq!(found, expected, "{name} {messages:?}"),
            (None, Err(Error::TemplateFailed { reason })) => {
                let expected = case["error"].as_str().unwrap();
                assert!(reason.starts_with(expected), "{name}: {reason} / {expected}");
            }
            (expected, found) => panic!("{name} {messages:?}: {expected:?} / {found:?}"),
        }
    }
}

#[test]
fn a_template_that_does_not_end_is_stopped_within_a_second() {
    // Each would take hours and is stopped by its count of instructions or by its amount of data.
    let endless = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x='ab') %}{% for a in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set x = 'ab' * 100000000000 %}{{ x }}",
        "{% set l = [0] * 100000000000 %}{{ l | length }}",
        "{% for a in range(90000) %}{{ range(90000) | list | tojson | length }}{% endfor %}",
        "{% for a in range(90000) %}{{ ('x' * 100000).replace('x', 'yy').upper().split('Y') | length }}{% endfor %}",
        "{{ 'x' | center(100000000000) }}",
    ];
    for template in endless {
        let began = Instant::now();
        let error = render(template).unwrap_err();
        assert!(
            matches!(
                error,
                Error::TemplateEndless { .. } | Error::TemplateFailed { .. } | Error::TemplateSyntax { .. }
            ),
            "{template}: {error}"
        );
        assert!(began.elapsed() < Duration::from_secs(1), "{template}");
    }
    // The same loops, but short ones.
    let control =
        "{% for a in range(10) %}{% for b in range(10) %}{% set x = a * b %}{% endfor %}{% endfor %}ok";
    assert_eq!(render(control).unwrap(), "ok");
}

#[test]
fn output_is_bounded() {
    // 1 MiB a round costs less than all instructions; the seventeenth is one too many.
    let template = |rounds: u32| {
        format!("{{% set x = 'x' * 1048576 %}}{{% for a in range({rounds}) %}}{{{{ x }}}}{{% endfor %}}")
    };
    assert_eq!(render(&template(16)).unwrap().len(), MAX_PROMPT_BYTES);
    let error = render(&template(17)).unwrap_err();
    assert!(matches!(error, Error::TemplateOutput { .. }), "{error}");
}

#[test]
fn exceptions_and_syntax_errors_keep_their_words() {
    let error = render("line\n{{ raise_exception('no system role here') }}").unwrap_err();
    assert!(
        matches!(&error, Error::TemplateFailed { reason } if reason == "no system role here (line 2)"),
        "{error}"
    );
    let error = render("{% if %}").unwrap_err();
    assert!(matches!(error, Error::TemplateSyntax { .. }), "{error}");
    let error = render(&"x".repeat(2 << 20)).unwrap_err();
    assert!(matches!(error, Error::TemplateTooLarge { .. }), "{error}");
    // Nothing outside the template is in reach.
    for outside in [
        "{% include '/etc/passwd' %}",
        "{% extends 'x' %}",
        "{% import 'os' as o %}",
    ] {
        assert!(render(outside).is_err(), "{outside}");
    }
}

#[test]
fn deep_nesting_does_not_exhaust_the_stack() {
    // Each is as deep as the bounds on size and fuel allow; an overflow would end the process.
    let refused = [
        format!("{{{{ {}1{} }}}}", "(".repeat(2_000), ")".repeat(2_000)),
        format!("{{{{ {}1{} }}}}", "[".repeat(2_000), "]".repeat(2_000)),
        format!("{{{{ {}1 }}}}", "1+".repeat(3_000)),
        "{% if x %}".repeat(13_000),
        "{%if x%}1{%elif y%}".repeat(6_000),
    ];
    for deep in refused {
        let error = render(&deep).unwrap_err();
        assert!(matches!(error, Error::TemplateSyntax { .. }), "{error}");
    }
    let either = [
        format!("{{{{ {}x }}}}", "not ".repeat(1_000)),
        format!("{{{{ {}1 }}}}", "-".repeat(4_000)),
        format!("{{{{ 1{} }}}}", "+1".repeat(2_000)),
        format!("{{{{ x{} }}}}", "|e".repeat(2_000)),
        format!("{{{{ x{} }}}}", ".y".repeat(2_000)),
        format!("{{{{ 1{} }}}}", "**1".repeat(1_300)),
        format!("{}{}", "{%if 1%}".repeat(7_000), "{%endif%}".repeat(7_000)),
        format!("{{%if x%}}1{}{{%endif%}}", "{%elif y%}".repeat(12_000)),
        "{% set ns = namespace(x=1) %}{% for a in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}ok".into(),
        "{% set ns = namespace(x=1) %}{% for a in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}".into(),
        "{% set ns = namespace(x=1) %}{% for a in range(30000) %}{% set ns.x = {'k': ns.x} %}{% endfor %}{{ ns.x | tojson }}".into(),
        "{% set ns = namespace(x=1) %}{% for a in range(60000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x == ns.x }}".into(),
    ];
    for deep in either {
        let began = Instant::now();
        let ended = render(&deep).map(|text| text.len());
        let took = began.elapsed();
        assert!(
            took < Duration::from_secs(2),
            "{took:?} {ended:?} {}",
            &deep[..80]
        );
    }
}

#[test]
fn long_strings_and_comments_are_no_long_tags() {
    let long = "it's é }} ".repeat(1_000);
    let template = format!("{{# don't {long} #}}{{{{ \"{long}\" ~ 'a\\'b' }}}}");
    assert_eq!(render(&template).unwrap(), format!("{long}a'b"));
}

#[test]
fn generation_tags_are_transparent() {
    let template = "a {%- generation -%} {{ messages[0].content }} {%- endgeneration %} b";
    assert_eq!(render(template).unwrap(), "ahello b");
}
