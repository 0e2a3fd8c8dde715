//! What a plugin says of itself, read from its file: none of its code runs.

use std::fs::File;
use std::path::Path;

use hoist_plugin_abi::{
    ABI_MAJOR, ABI_MINOR_MAX, ABI_MINOR_MIN, HEADER_MAGIC, HEADER_SIZE, HEADER_SYMBOL, negotiate,
};
use object::read::ReadCache;
use object::{Object, ObjectKind, ObjectSegment, ObjectSymbol};

use crate::{Error, Result};

/// The decoded header of a plugin, and what its file exports.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Header {
    /// Name, vendor, version and build, as the plugin gives them.
    pub name: String,
    /// Who made it.
    pub vendor: String,
    /// Its version.
    pub version: String,
    /// Its build.
    pub build_id: String,
    /// Target triple it was built for.
    pub target: String,
    /// Major version of the interface it speaks.
    pub abi_major: u32,
    /// Oldest minor it speaks.
    pub abi_minor_min: u32,
    /// Newest minor it speaks.
    pub abi_minor_max: u32,
    /// A panic ends the process.
    pub panic_abort: bool,
    /// It starts threads.
    pub spawns_threads: bool,
    /// Names it exports, sorted; more than the two it should export are legal and listed.
    pub exports: Vec<String>,
}

/// Most exported names that are listed.
const MAX_EXPORTS: usize = 64;

impl Header {
    /// Reads the header of an open file; `path` is for messages.
    ///
    /// # Errors
    /// [`Error::NotALibrary`], [`Error::WrongMachine`], [`Error::NoHeader`], [`Error::BadHeader`].
    pub fn read(path: &Path, file: &File) -> Result<Self> {
        let not_a_library = |reason: String| Error::NotALibrary {
            path: path.to_owned(),
            reason,
        };
        let cache = ReadCache::new(file);
        let object = object::File::parse(&cache).map_err(|e| not_a_library(e.to_string()))?;
        if object.kind() != ObjectKind::Dynamic {
            return Err(not_a_library(format!("it is of kind {:?}", object.kind())));
        }
        check_machine(path, &object)?;
        let mut exports = Vec::new();
        let mut address = None;
        for symbol in object
            .dynamic_symbols()
            .filter(|s| s.is_definition() && s.is_global())
        {
            let name = symbol.name().map_err(|e| not_a_library(e.to_string()))?;
            if name == HEADER_SYMBOL {
                address = Some(symbol.address());
            }
            if exports.len() < MAX_EXPORTS {
                exports.push(shown(name));
            }
        }
        exports.sort_unstable();
        let address = address.ok_or_else(|| Error::NoHeader {
            path: path.to_owned(),
        })?;
        let bytes = object
            .segments()
            .find_map(|s| s.data_range(address, HEADER_SIZE.into()).ok().flatten())
            .ok_or_else(|| Error::BadHeader {
                path: path.to_owned(),
                field: "position",
                expected: format!("{HEADER_SIZE} bytes of the file"),
                found: format!("address {address:#x} outside its data"),
            })?;
        Self::decode(path, bytes, exports)
    }

    fn decode(path: &Path, bytes: &[u8], exports: Vec<String>) -> Result<Self> {
        let bad = |field, expected: String, found: String| Error::BadHeader {
            path: path.to_owned(),
            field,
            expected,
            found,
        };
        let mut fields = Fields { rest: bytes };
        let magic = fields.take(16);
        if magic != HEADER_MAGIC {
            return Err(bad(
                "magic",
                format!("{:?}", HEADER_MAGIC.escape_ascii().to_string()),
                format!("{:?}", magic.escape_ascii().to_string()),
            ));
        }
        let size = fields.u32();
        if size != HEADER_SIZE {
            return Err(bad("header_size", HEADER_SIZE.to_string(), size.to_string()));
        }
        let (abi_major, abi_minor_min, abi_minor_max) = (fields.u32(), fields.u32(), fields.u32());
        if abi_minor_min > abi_minor_max {
            return Err(bad(
                "abi_minor_min..=abi_minor_max",
                "a range".into(),
                format!("{abi_minor_min}..={abi_minor_max}"),
            ));
        }
        let (flags, pointer_width) = (fields.u32(), fields.u32());
        if pointer_width != usize::BITS {
            return Err(bad(
                "pointer_width",
                usize::BITS.to_string(),
                pointer_width.to_string(),
            ));
        }
        let mut string = |field, len| {
            text(fields.take(len))
                .ok_or_else(|| bad(field, "UTF-8 ended by a NUL".into(), "something else".into()))
        };
        Ok(Self {
            target: string("target", 64)?,
            name: string("name", 64)?,
            vendor: string("vendor", 64)?,
            version: string("version", 32)?,
            build_id: string("build_id", 64)?,
            abi_major,
            abi_minor_min,
            abi_minor_max,
            panic_abort: flags & hoist_plugin_abi::FLAG_PANIC_ABORT != 0,
            spawns_threads: flags & hoist_plugin_abi::FLAG_SPAWNS_THREADS != 0,
            exports,
        })
    }

    /// The minor that this host and the plugin will speak.
    ///
    /// # Errors
    /// [`Error::Major`], [`Error::Minor`] with both ranges.
    pub fn agree(&self, path: &Path) -> Result<u32> {
        if self.abi_major != ABI_MAJOR {
            return Err(Error::Major {
                path: path.to_owned(),
                expected: ABI_MAJOR,
                found: self.abi_major,
            });
        }
        let (host, plugin) = (
            (ABI_MINOR_MIN, ABI_MINOR_MAX),
            (self.abi_minor_min, self.abi_minor_max),
        );
        negotiate(host, plugin).ok_or_else(|| Error::Minor {
            path: path.to_owned(),
            host,
            plugin,
        })
    }
}

fn check_machine<'a>(path: &Path, object: &impl Object<'a>) -> Result<()> {
    let found = match object.architecture() {
        object::Architecture::X86_64 => "x86_64".to_owned(),
        object::Architecture::Aarch64 => "aarch64".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    };
    let order = |little| if little { "little-endian" } else { "big-endian" };
    if found != std::env::consts::ARCH || object.is_little_endian() != cfg!(target_endian = "little") {
        return Err(Error::WrongMachine {
            path: path.to_owned(),
            expected: format!(
                "{} ({})",
                std::env::consts::ARCH,
                order(cfg!(target_endian = "little"))
            ),
            found: format!("{found} ({})", order(object.is_little_endian())),
        });
    }
    Ok(())
}

/// Takes fields off a slice that holds the whole header.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (field, rest) = self.rest.split_at(len);
        self.rest = rest;
        field
    }

    fn u32(&mut self) -> u32 {
        let field = self.take(4);
        u32::from_ne_bytes([field[0], field[1], field[2], field[3]])
    }
}

/// A NUL-terminated string in a fixed field, if it is one, as it may be shown.
pub(crate) fn text(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|b| *b == 0)?;
    std::str::from_utf8(&field[..end]).ok().map(shown)
}

/// Words of a plugin as a terminal may show them: what would steer it, or turn the direction of writing, is spelled out.
pub(crate) fn shown(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_steer_a_terminal_is_spelled_out() {
        assert_eq!(
            shown("Grafikkarte Nr. 1 \"ß\" \\ 日本"),
            "Grafikkarte Nr. 1 \"ß\" \\ 日本"
        );
        assert_eq!(
            shown("\u{1b}[2J\r\n\t\u{9b}1m\u{202e}"),
            "\\u{1b}[2J\\r\\n\\t\\u{9b}1m\\u{202e}"
        );
        assert_eq!(text(b"a\x07b\0c").as_deref(), Some("a\\u{7}b"));
        assert_eq!(text(b"\xff\0"), None);
        assert_eq!(text(b"unended"), None);
    }
}
