//! What is said on standard error, and how text of unknown origin is shown.
//!
//! Names of files, tensors and tokens come from whoever made them: a terminal must not act on what they contain.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::Write as _;

/// Most characters of a message that are shown: the name of a tensor may have millions.
const MESSAGE: usize = 4000;

/// Says a line on standard error: `error: …`. That nobody can read it is no failure of its own.
pub(crate) fn say(kind: &str, message: impl Display) {
    line(format_args!(
        "{kind}: {}",
        shortened(&visible(&message.to_string()), MESSAGE)
    ));
}

/// A line on standard error, of words of our own.
pub(crate) fn line(text: impl Display) {
    // Not `eprintln!`, which panics where standard error is full or has no reader.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// One line in which everything that a terminal would act on is spelt out: `\n`, `\u{1b}`.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, acts)
}

/// As [`visible`], with line ends and tabs as they are.
pub(crate) fn visible_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| acts(c) && c != '\n' && c != '\t')
}

/// As [`visible_lines`], with marks that only say which way text runs as they are: what a model writes may need them.
pub(crate) fn visible_prose(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c.is_control() && c != '\n' && c != '\t')
}

/// At most so many characters, and a `…` in the middle of what has more.
pub(crate) fn shortened(text: &str, characters: usize) -> Cow<'_, str> {
    // No character has less than a byte.
    if text.len() <= characters || text.chars().nth(characters).is_none() {
        return text.into();
    }
    let head = characters / 2;
    let tail = characters - head - 1;
    let mut out: String = text.chars().take(head).collect();
    out.push('…');
    let start = text.char_indices().rev().nth(tail.saturating_sub(1));
    out.push_str(start.map_or("", |(at, _)| &text[at..]));
    out.into()
}

/// Control characters, and those that end lines or change the order in which text is shown.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, acts: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&acts) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if acts(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_on_is_spelt_out_and_nothing_else_is() {
        assert_eq!(visible("\x1b[31mé\n\u{9b}x"), "\\u{1b}[31mé\\n\\u{9b}x");
        assert_eq!(visible("a\u{202e}b\u{2066}"), "a\\u{202e}b\\u{2066}");
        assert_eq!(visible_lines("a\tb\n\x1b]0;x\x07"), "a\tb\n\\u{1b}]0;x\\u{7}");
        assert_eq!(
            visible_prose("\u{200f}א\t\n\x1b[2J\r"),
            "\u{200f}א\t\n\\u{1b}[2J\\r"
        );
        for plain in ["", "model.gguf", "Ünïcödé 👨‍👩‍👧 א\\n"] {
            assert!(matches!(visible(plain), Cow::Borrowed(text) if text == plain));
        }
    }

    #[test]
    fn what_is_too_long_keeps_its_start_and_its_end() {
        assert_eq!(shortened("äbcdefgh", 8), "äbcdefgh");
        assert_eq!(shortened("äbcdefghi", 8), "äbcd…ghi");
        assert_eq!(shortened(&"é".repeat(9), 4).chars().count(), 4);
    }
}
