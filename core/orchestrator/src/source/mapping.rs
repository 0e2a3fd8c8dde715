use std::fs::File;
use std::sync::Arc;

use hoist_backend::Mapping;

struct MappedFile(memmap2::Mmap);

impl Mapping for MappedFile {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

struct InMemory(Arc<[u8]>);

impl Mapping for InMemory {
    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

pub(super) fn of_memory(bytes: Arc<[u8]>) -> Arc<dyn Mapping> {
    Arc::new(InMemory(bytes))
}

/// Maps a file read-only; `None` if the system refuses, or the file is no longer as long as its header was checked
/// against.
#[expect(
    unsafe_code,
    reason = "mapping a file is unsafe: the bytes can change under the reference"
)]
pub(super) fn of_file(file: &File, len: u64) -> Option<Arc<dyn Mapping>> {
    // SAFETY: the mapping is read-only, and it is made only for a backend that was opened to import, which the user
    // asked for and which the documentation says needs a file that nobody changes meanwhile. A file that shrinks all the
    // same raises SIGBUS and ends the process; one that is overwritten in place changes weights, never types: every byte
    // pattern is a valid `[u8]`, and no code derives a length or an index from mapped bytes.
    let map = unsafe { memmap2::Mmap::map(file) }.ok()?;
    (map.len() as u64 == len).then(|| Arc::new(MappedFile(map)) as Arc<dyn Mapping>)
}
