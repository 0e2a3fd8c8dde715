use std::io::Write;
use std::path::Path;
use std::time::SystemTime;

use hoist_formats::{Manifest, Metadata};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};

use crate::calendar::Moment;
use crate::huggingface::{read_json, read_limited};
use crate::{Error, Result, Tokenizer, metadata};

/// Instructions that a template may carry out, where 64 bytes of data count as one: a tenth of a second and 32 MiB or so.
/// Real templates use some hundreds for each message.
pub const TEMPLATE_FUEL: u64 = 500_000;
/// Most bytes that a template may write.
pub const MAX_PROMPT_BYTES: usize = 16 << 20;
/// Largest template that is compiled; real ones stay under 64 KiB.
const MAX_TEMPLATE_BYTES: usize = 128 << 10;
/// Longest tag of a template, strings not counted; real ones stay under 1 KiB. The compiler takes quadratic time over some.
const MAX_TAG_BYTES: usize = 4 << 10;
/// The engine recurses over nested expressions and nested values, without a limit of its own in all places. This is room for
/// the deepest ones that a template's size and fuel allow; memory that is not used is only reserved.
const STACK_BYTES: usize = 512 << 20;
/// The one template of an environment.
const NAME: &str = "chat";

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user` or `assistant`, as the template knows them.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A message of that role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        ChatMessage {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// What a template is told beside the messages.
#[derive(Clone, Copy, Debug)]
pub struct RenderOptions<'a> {
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Text of the bos token: `bos_token`.
    pub bos: Option<&'a str>,
    /// Text of the eos token: `eos_token`.
    pub eos: Option<&'a str>,
    /// What `strftime_now` takes for the time, in UTC.
    pub now: SystemTime,
}

impl<'a> RenderOptions<'a> {
    /// Options for a model's next answer: its tokens, the generation prompt, the present time.
    pub fn for_tokenizer(tokenizer: &'a Tokenizer) -> Self {
        RenderOptions {
            add_generation_prompt: true,
            bos: tokenizer.bos_text(),
            eos: tokenizer.eos_text(),
            now: SystemTime::now(),
        }
    }
}

/// Writes a conversation as the model was trained to read it: a Jinja template from the model file, with the environment
/// that Hugging Face gives it. Templates are untrusted: time, memory and output are bounded, and nothing outside is in reach.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// The template of a model, if it has one: `tokenizer.chat_template` of a GGUF file; `chat_template.jinja`, or
    /// `chat_template` in `tokenizer_config.json`, of a Hugging Face folder.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`], or what is wrong with the metadata or the files.
    pub fn from_manifest(manifest: &Manifest) -> Result<Option<ChatTemplate>> {
        let source = match (&manifest.metadata, &manifest.folder) {
            (Metadata::Gguf(map), _) => metadata::string(map, "tokenizer.chat_template")?.map(str::to_owned),
            (_, Some(folder)) => source_in(folder)?,
            (_, None) => None,
        };
        source.as_deref().map(ChatTemplate::new).transpose()
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`], [`Error::TemplateTooLarge`].
    pub fn new(source: &str) -> Result<ChatTemplate> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(Error::TemplateTooLarge {
                len: source.len(),
                limit: MAX_TEMPLATE_BYTES,
            });
        }
        check_tags(source)?;
        let environment = on_deep_stack(|| compile(source))?;
        Ok(ChatTemplate {
            environment,
            source: source.to_owned(),
        })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The prompt for a conversation. Its special tokens are written by name: encode it with `parse_special`, and without
    /// `add_special`, since templates write the bos token themselves.
    ///
    /// # Errors
    /// [`Error::TemplateFailed`] with the template's own words if it raised an exception, [`Error::TemplateEndless`],
    /// [`Error::TemplateOutput`].
    pub fn render(&self, messages: &[ChatMessage], options: &RenderOptions<'_>) -> Result<String> {
        on_deep_stack(|| self.render_here(messages, options))
    }

    fn render_here(&self, messages: &[ChatMessage], options: &RenderOptions<'_>) -> Result<String> {
        let failed = |error: minijinja::Error| match error.kind() {
            ErrorKind::OutOfFuel => Error::TemplateEndless { fuel: TEMPLATE_FUEL },
            _ => Error::TemplateFailed {
                reason: describe(&error),
            },
        };
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| {
                Value::from_pairs([
                    ("role", Value::from(m.role.as_str())),
                    ("content", Value::from(m.content.as_str())),
                ])
            })
            .collect();
        let now = Moment::from(options.now);
        let mut context = vec![
            ("messages", Value::from(messages)),
            (
                "add_generation_prompt",
                Value::from(options.add_generation_prompt),
            ),
            (
                "strftime_now",
                Value::from_function(move |format: &str| now.format(format)),
            ),
        ];
        let texts = [("bos_token", options.bos), ("eos_token", options.eos)];
        context.extend(
            texts
                .into_iter()
                .filter_map(|(name, text)| Some((name, Value::from(text?)))),
        );
        let mut prompt = Bounded {
            bytes: Vec::new(),
            exceeded: false,
        };
        let rendered = self
            .environment
            .get_template(NAME)
            .map_err(failed)?
            .render_captured_to(Value::from_pairs(context), &mut prompt)
            .map(|_| ());
        if prompt.exceeded {
            return Err(Error::TemplateOutput {
                limit: MAX_PROMPT_BYTES,
            });
        }
        rendered.map_err(failed)?;
        String::from_utf8(prompt.bytes).map_err(|error| Error::TemplateFailed {
            reason: error.to_string(),
        })
    }
}

/// Refuses a template with a tag of more than [`MAX_TAG_BYTES`].
fn check_tags(source: &str) -> Result<()> {
    let bytes = source.as_bytes();
    let mut at = 0;
    while let Some(open) = source[at..].find('{').map(|i| at + i) {
        at = open + 1;
        let close: &[u8] = match bytes.get(at) {
            Some(b'{') => b"}}",
            Some(b'%') => b"%}",
            Some(b'#') => {
                // A comment, in which quotes mean nothing.
                at = source[at..].find("#}").map_or(bytes.len(), |i| at + i + 2);
                continue;
            }
            _ => continue,
        };
        at += 1;
        let mut quote = None;
        let mut counted = 0;
        while at < bytes.len() {
            match (quote, bytes[at]) {
                (Some(_), b'\\') => at += 1,
                (Some(open), byte) if byte == open => quote = None,
                (Some(_), _) => {}
                (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
                (None, _) if bytes[at..].starts_with(close) => break,
                (None, _) => counted += 1,
            }
            at += 1;
            if counted > MAX_TAG_BYTES {
                let line = source.bytes().take(open).filter(|&b| b == b'\n').count() + 1;
                return Err(Error::TemplateSyntax {
                    reason: format!("a tag of more than {MAX_TAG_BYTES} bytes (line {line})"),
                });
            }
        }
        at = source.ceil_char_boundary(at);
    }
    Ok(())
}

fn compile(source: &str) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(TEMPLATE_FUEL));
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|error| Error::TemplateSyntax {
            reason: describe(&error),
        })?;
    environment.set_syntax(syntax);
    // Prompts are no web pages.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment
        .add_template_owned(NAME, without_generation_tags(source))
        .map_err(|error| Error::TemplateSyntax {
            reason: describe(&error),
        })?;
    Ok(environment)
}

/// Runs the engine on a thread with a stack of [`STACK_BYTES`].
fn on_deep_stack<T: Send>(run: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed = |reason: String| Error::TemplateFailed { reason };
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("chat template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, run)
            .map_err(|error| failed(format!("no thread to run it on: {error}")))?
            .join()
            .map_err(|_| failed("the template engine panicked".to_owned()))?
    })
}

/// The template of a Hugging Face folder.
fn source_in(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if let Some(bytes) = read_limited(&path, MAX_TEMPLATE_BYTES as u64)? {
        return String::from_utf8(bytes)
            .map(Some)
            .map_err(|error| Error::Malformed {
                path,
                reason: error.to_string(),
            });
    }
    let path = folder.join("tokenizer_config.json");
    let Some(config) = read_json(&path)? else {
        return Ok(None);
    };
    let text = match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => return Ok(None),
        Some(serde_json::Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(|n| n.as_str()) == Some("default"))
            .and_then(|t| t.get("template")),
        Some(other) => Some(other),
    };
    match text.and_then(|t| t.as_str()) {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(Error::Malformed {
            path,
            reason: "`chat_template` is neither a text nor a list with one named `default`".into(),
        }),
    }
}

/// Output of at most [`MAX_PROMPT_BYTES`].
struct Bounded {
    bytes: Vec<u8>,
    exceeded: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > MAX_PROMPT_BYTES - self.bytes.len() {
            self.exceeded = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False)`, which is what templates are written against.
fn to_json(value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => serde::Serialize::serialize(
            value,
            &mut serde_json::Serializer::with_formatter(&mut out, SpacedJson),
        ),
        Some(indent) => {
            let spaces = vec![b' '; indent.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            serde::Serialize::serialize(
                value,
                &mut serde_json::Serializer::with_formatter(&mut out, formatter),
            )
        }
    };
    let bad = |reason: String| minijinja::Error::new(ErrorKind::BadSerialization, reason);
    written.map_err(|error| bad(error.to_string()))?;
    String::from_utf8(out).map_err(|error| bad(error.to_string()))
}

/// JSON on one line, with spaces where Python puts them.
struct SpacedJson;

impl serde_json::ser::Formatter for SpacedJson {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Some templates mark what the assistant wrote, for training, with tags that Jinja does not have: they become blocks that
/// are always written.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(close) = rest[open..].find("%}").map(|at| open + at) else {
            break;
        };
        out.push_str(&rest[..open]);
        let tag = &rest[open..close];
        let word = tag[2..].trim_matches(|c: char| c.is_ascii_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace(word, "if true")),
            "endgeneration" => out.push_str(&tag.replace(word, "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[close..];
    }
    out.push_str(rest);
    out
}

fn describe(error: &minijinja::Error) -> String {
    let what = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}
