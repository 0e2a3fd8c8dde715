//! Files field by field, with nothing checked: what the hostile corpus is made of.

use apr_format::v2::{AprV2Flags, AprV2Header};

/// A GGUF file whose every field can be wrong.
#[derive(Clone, Debug)]
pub struct RawGguf {
    /// First four bytes.
    pub magic: [u8; 4],
    /// Version field, as bytes.
    pub version: [u8; 4],
    /// Number of tensors, if not the true one.
    pub tensor_count: Option<u64>,
    /// Number of pairs, if not the true one.
    pub pair_count: Option<u64>,
    /// Key, value type and value bytes.
    pub pairs: Vec<(Vec<u8>, u32, Vec<u8>)>,
    /// Length of the first key, if not the true one.
    pub key_len: Option<u64>,
    /// Tensor entries.
    pub tensors: Vec<RawGgufTensor>,
    /// Padding between header and data goes to a multiple of it.
    pub alignment: usize,
    /// Bytes after the padding.
    pub data: Vec<u8>,
}

/// An entry of [`RawGguf`].
#[derive(Clone, Debug)]
pub struct RawGgufTensor {
    /// Name.
    pub name: Vec<u8>,
    /// Length of the name, if not the true one.
    pub name_len: Option<u64>,
    /// Number of dimensions, if not the true one.
    pub rank: Option<u32>,
    /// Dimensions, fastest first.
    pub dims: Vec<u64>,
    /// `ggml_type`.
    pub id: u32,
    /// Offset from the start of the data.
    pub offset: u64,
}

impl RawGguf {
    /// A valid file: an architecture, and two F32 tensors `a` and `b` of `[4, 8]`.
    pub fn valid() -> Self {
        let tensor = |name: &str, offset| RawGgufTensor {
            name: name.into(),
            name_len: None,
            rank: None,
            dims: vec![8, 4],
            id: 0,
            offset,
        };
        Self {
            magic: *b"GGUF",
            version: 3u32.to_le_bytes(),
            tensor_count: None,
            pair_count: None,
            pairs: vec![(b"general.architecture".to_vec(), 8, Self::string(b"llama"))],
            key_len: None,
            tensors: vec![tensor("a", 0), tensor("b", 128)],
            alignment: 32,
            data: vec![0; 256],
        }
    }

    /// A string with its length in front.
    pub fn string(s: &[u8]) -> Vec<u8> {
        let mut out = (s.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(s);
        out
    }

    /// The value bytes of an array: element type, number of elements, elements.
    pub fn array(kind: u32, count: u64, elements: &[u8]) -> Vec<u8> {
        let mut out = kind.to_le_bytes().to_vec();
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(elements);
        out
    }

    /// With one more pair.
    #[must_use]
    pub fn with(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.pairs.push((key.into(), kind, value));
        self
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend_from_slice(&self.version);
        let tensors = self.tensor_count.unwrap_or(self.tensors.len() as u64);
        out.extend_from_slice(&tensors.to_le_bytes());
        let pairs = self.pair_count.unwrap_or(self.pairs.len() as u64);
        out.extend_from_slice(&pairs.to_le_bytes());
        let mut key_len = self.key_len;
        for (key, kind, value) in &self.pairs {
            out.extend_from_slice(&key_len.take().unwrap_or(key.len() as u64).to_le_bytes());
            out.extend_from_slice(key);
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(value);
        }
        for t in &self.tensors {
            out.extend_from_slice(&t.name_len.unwrap_or(t.name.len() as u64).to_le_bytes());
            out.extend_from_slice(&t.name);
            out.extend_from_slice(&t.rank.unwrap_or(t.dims.len() as u32).to_le_bytes());
            for dim in &t.dims {
                out.extend_from_slice(&dim.to_le_bytes());
            }
            out.extend_from_slice(&t.id.to_le_bytes());
            out.extend_from_slice(&t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend_from_slice(&self.data);
        out
    }
}

/// A SafeTensors file whose header is any text.
#[derive(Clone, Debug)]
pub struct RawSafeTensors {
    /// Length of the header, if not the true one.
    pub header_len: Option<u64>,
    /// The header.
    pub header: Vec<u8>,
    /// Bytes after it.
    pub data: Vec<u8>,
}

impl RawSafeTensors {
    /// A file with that header and 64 bytes of data.
    pub fn new(header: &str) -> Self {
        Self {
            header_len: None,
            header: header.into(),
            data: vec![0; 64],
        }
    }

    /// A valid file: `a` is F32 `[2, 4]`, `b` is F16 `[16]`.
    pub fn valid() -> Self {
        Self::new(
            r#"{"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},"b":{"dtype":"F16","shape":[16],"data_offsets":[32,64]}}"#,
        )
    }

    /// The valid file with one piece of its header replaced.
    pub fn replaced(from: &str, to: &str) -> Self {
        let valid = Self::valid();
        let header = String::from_utf8(valid.header).expect("text");
        assert!(header.contains(from), "`{from}` is in the valid header");
        Self::new(&header.replacen(from, to, 1))
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let len = self.header_len.unwrap_or(self.header.len() as u64);
        let mut out = len.to_le_bytes().to_vec();
        out.extend_from_slice(&self.header);
        out.extend_from_slice(&self.data);
        out
    }
}

/// An APR file whose every field can be wrong; the header's checksum is made right unless told otherwise.
#[derive(Clone, Debug)]
pub struct RawApr {
    /// The header; offsets and counts of zero are replaced by the true ones.
    pub header: AprV2Header,
    /// Whether to leave the checksum as it is.
    pub keep_checksum: bool,
    /// JSON.
    pub metadata: Vec<u8>,
    /// Entries of the index.
    pub entries: Vec<RawAprEntry>,
    /// Bytes from the data offset on.
    pub data: Vec<u8>,
    /// The last bytes; by default the right CRC32.
    pub footer: Option<Vec<u8>>,
}

/// An entry of [`RawApr`].
#[derive(Clone, Debug)]
pub struct RawAprEntry {
    /// Name.
    pub name: Vec<u8>,
    /// Type id.
    pub dtype: u8,
    /// Dimensions, slowest first.
    pub dims: Vec<u64>,
    /// Offset from the start of the data.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl RawApr {
    /// A valid file: F32 tensors `a` and `b` of `[2, 32]`.
    pub fn valid() -> Self {
        let entry = |name: &str, offset| RawAprEntry {
            name: name.into(),
            dtype: 0,
            dims: vec![2, 32],
            offset,
            size: 256,
        };
        let mut header = AprV2Header::new();
        header.metadata_offset = 0;
        Self {
            header,
            keep_checksum: false,
            metadata: br#"{"architecture":"llama"}"#.to_vec(),
            entries: vec![entry("a", 0), entry("b", 256)],
            data: vec![0; 512],
            footer: None,
        }
    }

    /// A file that is one LZ4 block behind its header, and decompresses to a tensor of that many bytes of zeros, a multiple
    /// of 4, with a checksum of zero, which is wrong.
    pub fn lz4_of_zeros(zeros: u32) -> Vec<u8> {
        let mut file = Self::valid();
        file.header.flags = file.header.flags.with(AprV2Flags::LZ4_COMPRESSED);
        file.entries.truncate(1);
        file.entries[0].dims = vec![1, u64::from(zeros / 4)];
        file.entries[0].size = zeros.into();
        file.data.clear();
        file.footer = Some(Vec::new());
        let bytes = file.bytes();
        let (header, front) = bytes.split_at(64);
        // The checksum is of zeros too.
        let zeros = zeros as usize + 4;
        let length = |out: &mut Vec<u8>, mut n: usize| {
            while n >= 255 {
                out.push(255);
                n -= 255;
            }
            out.push(n as u8);
        };
        let mut out = header.to_vec();
        out.extend_from_slice(&((front.len() + zeros) as u32).to_le_bytes());
        // What precedes the data and a zero, which is then repeated; the format wants five literals at the end.
        out.push(0xff);
        length(&mut out, front.len() + 1 - 15);
        out.extend_from_slice(front);
        out.extend_from_slice(&[0, 1, 0]);
        length(&mut out, zeros - 1 - 5 - 4 - 15);
        out.extend_from_slice(&[0x50, 0, 0, 0, 0, 0]);
        out
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut index = Vec::new();
        for e in &self.entries {
            index.extend_from_slice(&(e.name.len() as u16).to_le_bytes());
            index.extend_from_slice(&e.name);
            index.push(e.dtype);
            index.push(e.dims.len() as u8);
            for dim in &e.dims {
                index.extend_from_slice(&dim.to_le_bytes());
            }
            index.extend_from_slice(&e.offset.to_le_bytes());
            index.extend_from_slice(&e.size.to_le_bytes());
        }
        let mut header = self.header;
        let or = |v: &mut u64, default: usize| {
            if *v == 0 {
                *v = default as u64;
            }
        };
        let metadata_end = 64 + self.metadata.len().next_multiple_of(64);
        let data_start = metadata_end + index.len().next_multiple_of(64);
        or(&mut header.metadata_offset, 64);
        or(&mut header.tensor_index_offset, metadata_end);
        or(&mut header.data_offset, data_start);
        if header.metadata_size == 0 {
            header.metadata_size = self.metadata.len() as u32;
        }
        if header.tensor_count == 0 {
            header.tensor_count = self.entries.len() as u32;
        }
        if !self.keep_checksum {
            header.update_checksum();
        }
        let mut out = header.to_bytes().to_vec();
        out.extend_from_slice(&self.metadata);
        out.resize(metadata_end, 0);
        out.extend_from_slice(&index);
        out.resize(data_start, 0);
        out.extend_from_slice(&self.data);
        let crc = crc32fast::hash(&out).to_le_bytes().to_vec();
        out.extend_from_slice(self.footer.as_ref().unwrap_or(&crc));
        out
    }
}
