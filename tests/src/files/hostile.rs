//! The hostile corpus: each model is refused, and its control, which differs from it in one thing, is not.

use apr_format::v2::{AprV2Flags, AprV2Header};

use super::ModelFiles;
use super::raw::{RawApr, RawAprEntry, RawGguf, RawSafeTensors};
use super::tiny::{AprStorage, TinyLlama};
use hoist_formats::Encoding;

/// A model that must be refused.
#[derive(Clone, Debug)]
pub struct Hostile {
    /// Unique, `format/property`.
    pub name: &'static str,
    /// The files.
    pub model: ModelFiles,
    /// The same without the fault.
    pub control: ModelFiles,
    /// Variant of `hoist_formats::Error`.
    pub error: &'static str,
    /// What the message must contain: what, where, expected, found.
    pub says: &'static [&'static str],
}

const HUGE: u64 = 1 << 63;

/// All of them.
pub fn hostile() -> Vec<Hostile> {
    let mut out = Vec::new();
    gguf(&mut out);
    gguf_split(&mut out);
    safetensors(&mut out);
    hugging_face(&mut out);
    apr(&mut out);
    apr_shards(&mut out);
    out
}

fn single(
    out: &mut Vec<Hostile>,
    name: &'static str,
    error: &'static str,
    says: &'static [&'static str],
    file: &str,
    control: Vec<u8>,
    bad: Vec<u8>,
) {
    out.push(Hostile {
        name,
        model: ModelFiles::single(file, bad),
        control: ModelFiles::single(file, control),
        error,
        says,
    });
}

fn gguf(out: &mut Vec<Hostile>) {
    type Says = &'static [&'static str];
    let mut add = |name, error, says: Says, change: &dyn Fn(&mut RawGguf)| {
        let mut file = RawGguf::valid();
        change(&mut file);
        single(
            out,
            name,
            error,
            says,
            "model.gguf",
            RawGguf::valid().bytes(),
            file.bytes(),
        );
    };
    let string = |s: &[u8]| RawGguf::string(s);
    add("gguf/magic", "WrongMagic", &["GGUX", "the magic `GGUF`"], &|f| {
        f.magic = *b"GGUX";
    });
    add("gguf/magic_of_an_older_format", "WrongMagic", &["tjgg"], &|f| {
        f.magic = *b"tjgg";
    });
    add(
        "gguf/version_1",
        "UnsupportedVersion",
        &["version 1", "2 or 3"],
        &|f| {
            f.version = 1u32.to_le_bytes();
        },
    );
    add(
        "gguf/version_4",
        "UnsupportedVersion",
        &["version 4", "2 or 3"],
        &|f| {
            f.version = 4u32.to_le_bytes();
        },
    );
    add(
        "gguf/big_endian",
        "BigEndian",
        &["big-endian", "0x03000000"],
        &|f| {
            f.version = 3u32.to_be_bytes();
        },
    );
    add(
        "gguf/tensor_count_of_2_63",
        "CountTooLarge",
        &["number of tensors", "at byte 8", "9223372036854775808", "at most"],
        &|f| f.tensor_count = Some(HUGE),
    );
    add(
        "gguf/tensor_count_beyond_the_entries",
        "Truncated",
        &["tensor 2", "the file has"],
        &|f| {
            f.tensor_count = Some(3);
            f.data.clear();
            f.alignment = 1;
        },
    );
    add(
        "gguf/pair_count_of_2_63",
        "CountTooLarge",
        &["number of metadata pairs", "at byte 16", "9223372036854775808"],
        &|f| f.pair_count = Some(HUGE),
    );
    add(
        "gguf/key_length_of_2_63",
        "CountTooLarge",
        &[
            "the length of metadata key 0",
            "at byte 24",
            "9223372036854775808",
        ],
        &|f| f.key_len = Some(HUGE),
    );
    add(
        "gguf/string_length_of_2_63",
        "CountTooLarge",
        &[
            "the length of the value of metadata `general.architecture`",
            "9223372036854775808",
        ],
        &|f| f.pairs[0].2[..8].copy_from_slice(&HUGE.to_le_bytes()),
    );
    add(
        "gguf/name_length_of_2_63",
        "CountTooLarge",
        &["the length of the name of tensor 0", "9223372036854775808"],
        &|f| f.tensors[0].name_len = Some(HUGE),
    );
    add(
        "gguf/key_twice",
        "DuplicateKey",
        &["`general.architecture`", "twice"],
        &|f| {
            f.pairs.push(f.pairs[0].clone());
        },
    );
    add("gguf/tensor_twice", "DuplicateTensor", &["`a`", "twice"], &|f| {
        f.tensors[1].name = b"a".to_vec();
    });
    add(
        "gguf/key_that_is_not_utf_8",
        "NotUtf8",
        &["metadata key 0", "at byte 32"],
        &|f| {
            f.pairs[0].0[0] = 0xff;
        },
    );
    add(
        "gguf/value_that_is_not_utf_8",
        "NotUtf8",
        &["metadata `general.architecture`"],
        &|f| f.pairs[0].2 = string(b"\xc3\x28"),
    );
    add(
        "gguf/tensor_name_that_is_not_utf_8",
        "NotUtf8",
        &["the name of tensor 1"],
        &|f| f.tensors[1].name = b"\xed\xa0\x80".to_vec(),
    );
    add("gguf/empty_tensor_name", "EmptyName", &["tensor 1"], &|f| {
        f.tensors[1].name.clear();
    });
    add(
        "gguf/no_dimensions",
        "InvalidRank",
        &["`a`", "1 to 4", "found 0"],
        &|f| {
            f.tensors[0].rank = Some(0);
        },
    );
    add(
        "gguf/five_dimensions",
        "InvalidRank",
        &["`a`", "1 to 4", "found 5"],
        &|f| {
            f.tensors[0].dims = vec![8, 4, 1, 1, 1];
        },
    );
    add(
        "gguf/rank_of_2_32",
        "InvalidRank",
        &["`a`", "found 4294967295"],
        &|f| {
            f.tensors[0].rank = Some(u32::MAX);
        },
    );
    add("gguf/zero_dimension", "ZeroDimension", &["`a`", "[4, 0]"], &|f| {
        f.tensors[0].dims = vec![0, 4];
    });
    add(
        "gguf/dimensions_whose_product_overflows",
        "ShapeOverflow",
        &["`a`", "[4294967296, 4294967296]", "f32"],
        &|f| f.tensors[0].dims = vec![1 << 32, 1 << 32],
    );
    add(
        "gguf/size_that_overflows",
        "ShapeOverflow",
        &["`a`", "f32"],
        &|f| {
            f.tensors[0].dims = vec![1 << 62];
        },
    );
    add(
        "gguf/dimension_beyond_the_file",
        "TensorOutOfBounds",
        &["`a`", "the file has"],
        &|f| f.tensors[0].dims = vec![1 << 40],
    );
    add(
        "gguf/row_that_splits_a_block",
        "PartialBlock",
        &["`a`", "256", "q4_k", "found 8"],
        &|f| f.tensors[0].id = 12,
    );
    add("gguf/unknown_type", "UnknownEncoding", &["`a`", "999"], &|f| {
        f.tensors[0].id = 999;
    });
    add("gguf/future_type", "UnknownEncoding", &["`a`", "43"], &|f| {
        f.tensors[0].id = 43;
    });
    add(
        "gguf/removed_type_4",
        "RemovedEncoding",
        &["`a`", "id 4", "removed"],
        &|f| {
            f.tensors[0].id = 4;
        },
    );
    add(
        "gguf/removed_type_31",
        "RemovedEncoding",
        &["`a`", "id 31", "removed"],
        &|f| {
            f.tensors[0].id = 31;
        },
    );
    add(
        "gguf/removed_type_38",
        "RemovedEncoding",
        &["`a`", "id 38", "removed"],
        &|f| {
            f.tensors[0].id = 38;
        },
    );
    add(
        "gguf/misaligned_offset",
        "Misaligned",
        &["`b`", "multiple of 32", "found 129"],
        &|f| f.tensors[1].offset = 129,
    );
    add(
        "gguf/offset_beyond_the_end",
        "TensorOutOfBounds",
        &["`b`", "the file has"],
        &|f| {
            f.tensors[1].offset = 256;
        },
    );
    add("gguf/offset_of_2_63", "TensorOutOfBounds", &["`b`"], &|f| {
        f.tensors[1].offset = HUGE;
    });
    add("gguf/offset_near_2_64", "TensorOutOfBounds", &["`b`"], &|f| {
        f.tensors[1].offset = u64::MAX - 31;
    });
    add("gguf/overlap", "Overlap", &["`a`", "`b`"], &|f| {
        f.tensors[1].offset = 96;
    });
    add("gguf/same_bytes", "Overlap", &["`a`", "`b`"], &|f| {
        f.tensors[1].offset = 0;
    });
    add(
        "gguf/last_byte_missing",
        "TensorOutOfBounds",
        &["`b`", "the file has"],
        &|f| {
            f.data.truncate(255);
        },
    );

    let mut pair = |name, error, says: Says, key: &str, good: (u32, Vec<u8>), bad: (u32, Vec<u8>)| {
        let control = RawGguf::valid().with(key, good.0, good.1).bytes();
        let bad = RawGguf::valid().with(key, bad.0, bad.1).bytes();
        single(out, name, error, says, "model.gguf", control, bad);
    };
    let array = |kind, count: u64, bytes: &[u8]| (9, RawGguf::array(kind, count, bytes));
    pair(
        "gguf/unknown_value_type",
        "UnknownMetaType",
        &["`k`", "found 13"],
        "k",
        (0, vec![0]),
        (13, vec![0]),
    );
    pair(
        "gguf/unknown_element_type",
        "UnknownMetaType",
        &["`k`", "found 99"],
        "k",
        array(0, 1, &[0]),
        array(99, 1, &[0]),
    );
    pair(
        "gguf/array_of_arrays",
        "NestedArray",
        &["`k`", "array of arrays"],
        "k",
        array(0, 1, &[0]),
        array(9, 1, &RawGguf::array(0, 1, &[0])),
    );
    pair(
        "gguf/bool_of_2",
        "InvalidField",
        &["`k`", "0 or 1", "found 2"],
        "k",
        (7, vec![1]),
        (7, vec![2]),
    );
    pair(
        "gguf/bool_of_2_in_an_array",
        "InvalidField",
        &["`k`", "0 or 1", "found 2"],
        "k",
        array(7, 2, &[0, 1]),
        array(7, 2, &[0, 2]),
    );
    let count: Says = &["the number of elements of metadata `k`", "9223372036854775808"];
    pair(
        "gguf/array_of_2_63_bytes",
        "CountTooLarge",
        count,
        "k",
        array(0, 1, &[0]),
        array(0, HUGE, &[0]),
    );
    pair(
        "gguf/array_of_2_63_doubles",
        "CountTooLarge",
        count,
        "k",
        array(12, 1, &[0; 8]),
        array(12, HUGE, &[0; 8]),
    );
    pair(
        "gguf/array_of_2_63_strings",
        "CountTooLarge",
        count,
        "k",
        array(8, 1, &RawGguf::string(b"s")),
        array(8, HUGE, &RawGguf::string(b"s")),
    );
    pair(
        "gguf/string_in_an_array_that_is_not_utf_8",
        "NotUtf8",
        &["element 1 of metadata `k`"],
        "k",
        array(8, 2, &[string(b"s"), string(b"t")].concat()),
        array(8, 2, &[string(b"s"), string(b"\xff")].concat()),
    );
    let key = "general.alignment";
    let aligned = (4, 32u32.to_le_bytes().to_vec());
    pair(
        "gguf/alignment_of_zero",
        "InvalidAlignment",
        &["power of two", "found 0"],
        key,
        aligned.clone(),
        (4, vec![0; 4]),
    );
    pair(
        "gguf/alignment_of_24",
        "InvalidAlignment",
        &["power of two", "found 24"],
        key,
        aligned.clone(),
        (4, 24u32.to_le_bytes().to_vec()),
    );
    pair(
        "gguf/alignment_of_2_63",
        "Misaligned",
        &["9223372036854775808"],
        key,
        aligned.clone(),
        (10, HUGE.to_le_bytes().to_vec()),
    );
    pair(
        "gguf/alignment_that_is_text",
        "WrongMetaType",
        &["`general.alignment`", "integer", "string \"32\""],
        key,
        aligned.clone(),
        (8, string(b"32")),
    );
    pair(
        "gguf/alignment_that_is_negative",
        "WrongMetaType",
        &["`general.alignment`", "integer", "i32 -32"],
        key,
        aligned,
        (5, (-32i32).to_le_bytes().to_vec()),
    );

    // As many bytes as the control has, but strings cost memory that bytes do not.
    let strings = 2_200_000;
    let bytes = vec![0; 8 * strings];
    pair(
        "gguf/strings_that_cost_too_much_memory",
        "HeaderTooLarge",
        &["`k`", "the limit is 50331648"],
        "k",
        array(0, bytes.len() as u64, &bytes),
        array(8, strings as u64, &bytes),
    );

    single(
        out,
        "gguf/empty_file",
        "Empty",
        &["is empty"],
        "model.gguf",
        RawGguf::valid().bytes(),
        Vec::new(),
    );
    let mut short = RawGguf::valid();
    short.tensors.truncate(1);
    short.tensors[0].dims = vec![1];
    short.data.truncate(32);
    let padded = short.bytes();
    short.data.truncate(4);
    single(
        out,
        "gguf/padding_missing",
        "TensorOutOfBounds",
        &["`a`", "the file has"],
        "model.gguf",
        padded,
        short.bytes(),
    );
}

/// Changes one file of a model.
fn changed(model: &ModelFiles, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> ModelFiles {
    let mut model = model.clone();
    let (_, bytes) = model
        .files
        .iter_mut()
        .find(|(n, _)| n == name)
        .expect("a file of the model");
    change(bytes);
    model
}

/// The model without one of its files.
fn without(model: &ModelFiles, name: &str) -> ModelFiles {
    let mut model = model.clone();
    let count = model.files.len();
    model.files.retain(|(n, _)| n != name);
    assert_eq!(model.files.len() + 1, count, "a file of the model");
    model
}

/// The model with one piece of a text file replaced.
fn replaced(model: &ModelFiles, name: &str, from: &str, to: &str) -> ModelFiles {
    changed(model, name, |bytes| {
        let text = std::str::from_utf8(bytes).expect("a text file");
        assert!(text.contains(from), "`{from}` is in {name}");
        *bytes = text.replacen(from, to, 1).into_bytes();
    })
}

/// Replaces bytes that occur once.
fn patch(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let at = bytes
        .windows(from.len())
        .position(|w| w == from)
        .expect("the bytes to patch");
    bytes[at..at + to.len()].copy_from_slice(to);
}

fn gguf_split(out: &mut Vec<Hostile>) {
    let control = TinyLlama::small().gguf_split(Encoding::F16, 3);
    let mut add = |name, error, says, model| {
        out.push(Hostile {
            name,
            model,
            control: control.clone(),
            error,
            says,
        });
    };
    let (first, second, third) = (
        "tiny-00001-of-00003.gguf",
        "tiny-00002-of-00003.gguf",
        "tiny-00003-of-00003.gguf",
    );
    let copy = |from: &str, to: &str| {
        let (_, bytes) = control
            .files
            .iter()
            .find(|(n, _)| n == from)
            .expect("a file of the model")
            .clone();
        changed(&control, to, |b| *b = bytes)
    };
    let pair = |key: &str, kind: u32, value: &[u8]| {
        let mut out = key.as_bytes().to_vec();
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(value);
        out
    };
    add(
        "gguf_split/missing_shard",
        "MissingShard",
        &["tiny-00001-of-00003.gguf", "tiny-00003-of-00003.gguf"],
        without(&control, third),
    );
    add(
        "gguf_split/duplicate_shard",
        "ShardMismatch",
        &["tiny-00003-of-00003.gguf", "`split.no`", "expected 2", "found 1"],
        copy(second, third),
    );
    add(
        "gguf_split/empty_shard",
        "Empty",
        &["tiny-00002-of-00003.gguf"],
        changed(&control, second, Vec::clear),
    );
    add(
        "gguf_split/shard_of_another_format",
        "WrongMagic",
        &["tiny-00002-of-00003.gguf", "GGUF"],
        changed(&control, second, |b| b[..4].copy_from_slice(b"APR\0")),
    );
    add(
        "gguf_split/wrong_shard_count",
        "ShardMismatch",
        &[
            "tiny-00002-of-00003.gguf",
            "`split.count`",
            "expected 3",
            "found 4",
        ],
        changed(&control, second, |b| {
            patch(
                b,
                &pair("split.count", 2, &[3, 0]),
                &pair("split.count", 2, &[4, 0]),
            );
        }),
    );
    add(
        "gguf_split/count_beyond_the_name",
        "ShardMismatch",
        &["-00001-of-00004", "found tiny-00001-of-00003.gguf"],
        changed(&control, first, |b| {
            patch(
                b,
                &pair("split.count", 2, &[3, 0]),
                &pair("split.count", 2, &[4, 0]),
            );
        }),
    );
    let tensors = (control_tensors() as u32).to_le_bytes();
    add(
        "gguf_split/wrong_tensor_count",
        "ShardMismatch",
        &["`split.tensors.count`", "expected 11", "found 12"],
        changed(&control, second, |b| {
            let more = (control_tensors() as u32 + 1).to_le_bytes();
            patch(
                b,
                &pair("split.tensors.count", 5, &tensors),
                &pair("split.tensors.count", 5, &more),
            );
        }),
    );
    add(
        "gguf_split/tensor_count_that_is_a_float",
        "WrongMetaType",
        &["`split.tensors.count`", "integer", "f32"],
        changed(&control, first, |b| {
            patch(
                b,
                &pair("split.tensors.count", 5, &tensors)[..23],
                &pair("split.tensors.count", 6, &tensors)[..23],
            );
        }),
    );
    add(
        "gguf_split/tensor_in_two_shards",
        "DuplicateTensor",
        &["`blk.0.attn_q.weight`"],
        changed(&control, second, |b| {
            patch(b, b"blk.0.attn_v.weight", b"blk.0.attn_q.weight");
        }),
    );
    let mut renamed = control.clone();
    renamed.files[0].0 = "first.gguf".into();
    renamed.open = "first.gguf".into();
    add(
        "gguf_split/first_shard_under_another_name",
        "ShardMismatch",
        &["-00001-of-00003", "found first.gguf"],
        renamed,
    );
}

fn control_tensors() -> usize {
    TinyLlama::small().tensors().len()
}

fn safetensors(out: &mut Vec<Hostile>) {
    const NAME: &str = "model.safetensors";
    let control = RawSafeTensors::valid().bytes();
    let mut add = |name, error, says, bytes| single(out, name, error, says, NAME, control.clone(), bytes);
    let header = |from: &str, to: &str| RawSafeTensors::replaced(from, to).bytes();
    let changed = |change: &dyn Fn(&mut RawSafeTensors)| {
        let mut file = RawSafeTensors::valid();
        change(&mut file);
        file.bytes()
    };
    add("safetensors/empty_file", "Empty", &["is empty"], Vec::new());
    add(
        "safetensors/header_length_of_2_63",
        "CountTooLarge",
        &["the length of the header", "at byte 0", "9223372036854775808"],
        changed(&|f| f.header_len = Some(HUGE)),
    );
    add(
        "safetensors/header_that_is_an_array",
        "WrongMagic",
        &["byte 0"],
        changed(&|f| f.header[0] = b'['),
    );
    add(
        "safetensors/header_that_is_cut",
        "Json",
        &["the JSON header", "EOF"],
        changed(&|f| f.header_len = Some(f.header.len() as u64 - 1)),
    );
    add(
        "safetensors/header_with_something_after_it",
        "Json",
        &["trailing characters"],
        changed(&|f| f.header.extend_from_slice(b"  x")),
    );
    add(
        "safetensors/header_that_is_not_utf_8",
        "NotUtf8",
        &["the JSON header", "at byte 2"],
        changed(&|f| f.header[2] = 0xff),
    );
    add(
        "safetensors/tensor_twice",
        "DuplicateTensor",
        &["`a`", "twice"],
        header(r#""b""#, r#""a""#),
    );
    add(
        "safetensors/metadata_twice",
        "DuplicateKey",
        &["`__metadata__`"],
        header("{", r#"{"__metadata__":{},"__metadata__":{},"#),
    );
    add(
        "safetensors/metadata_key_twice",
        "DuplicateKey",
        &["`x`", "twice"],
        header("{", r#"{"__metadata__":{"x":"1","x":"2"},"#),
    );
    add(
        "safetensors/metadata_that_is_not_text",
        "Json",
        &["expected a string"],
        header("{", r#"{"__metadata__":{"x":1},"#),
    );
    add(
        "safetensors/unknown_field",
        "Json",
        &["unknown field `strides`"],
        header(r#""shape""#, r#""strides":[1],"shape""#),
    );
    add(
        "safetensors/field_twice",
        "Json",
        &["duplicate field `shape`"],
        header(r#""shape""#, r#""shape":[1],"shape""#),
    );
    add(
        "safetensors/field_missing",
        "Json",
        &["missing field `dtype`"],
        header(r#""dtype":"F32","#, ""),
    );
    add(
        "safetensors/empty_name",
        "EmptyName",
        &["tensor 0"],
        header(r#""a""#, r#""""#),
    );
    add(
        "safetensors/f8",
        "UnsupportedDtype",
        &["`a`", "F8_E4M3", "expected F32"],
        header("F32", "F8_E4M3"),
    );
    add(
        "safetensors/unknown_type",
        "UnsupportedDtype",
        &["`a`", "F31"],
        header("F32", "F31"),
    );
    add(
        "safetensors/zero_dimension",
        "ZeroDimension",
        &["`a`", "[0, 4]"],
        header("[2,4]", "[0,4]"),
    );
    add(
        "safetensors/nine_dimensions",
        "InvalidRank",
        &["`a`", "at most 8", "found 9"],
        header("[2,4]", "[2,4,1,1,1,1,1,1,1]"),
    );
    add(
        "safetensors/dimensions_whose_product_overflows",
        "ShapeOverflow",
        &["`a`", "f32"],
        header("[2,4]", "[4294967296,4294967296]"),
    );
    add(
        "safetensors/negative_dimension",
        "Json",
        &["invalid value", "-2"],
        header("[2,4]", "[-2,4]"),
    );
    add(
        "safetensors/dimension_of_2_64",
        "Json",
        &["the JSON header"],
        header("[2,4]", "[18446744073709551616,4]"),
    );
    add(
        "safetensors/size_that_is_not_the_shape_s",
        "SizeMismatch",
        &["`a`", "[2, 5]", "expected 40", "found 32"],
        header("[2,4]", "[2,5]"),
    );
    add(
        "safetensors/end_before_start",
        "InvalidField",
        &["`data_offsets`", "`a`", "[32, 0]"],
        header("[0,32]", "[32,0]"),
    );
    add(
        "safetensors/offset_of_2_63",
        "TensorOutOfBounds",
        &["`a`", "the file has"],
        header("[0,32]", "[9223372036854775808,9223372036854775840]"),
    );
    add(
        "safetensors/offset_near_2_64",
        "TensorOutOfBounds",
        &["`a`"],
        header("[0,32]", "[18446744073709551583,18446744073709551615]"),
    );
    add(
        "safetensors/offset_beyond_the_end",
        "TensorOutOfBounds",
        &["`b`", "the file has"],
        header("[32,64]", "[64,96]"),
    );
    add(
        "safetensors/overlap",
        "Overlap",
        &["`a`", "`b`"],
        header("[32,64]", "[16,48]"),
    );
    add(
        "safetensors/gap",
        "Gap",
        &["before tensor `b`"],
        RawSafeTensors {
            data: vec![0; 72],
            ..RawSafeTensors::replaced("[32,64]", "[40,72]")
        }
        .bytes(),
    );
    add(
        "safetensors/gap_in_front",
        "Gap",
        &["before tensor `a`"],
        RawSafeTensors {
            data: vec![0; 72],
            ..RawSafeTensors::new(
                r#"{"a":{"dtype":"F32","shape":[2,4],"data_offsets":[8,40]},"b":{"dtype":"F16","shape":[16],"data_offsets":[40,72]}}"#,
            )
        }
        .bytes(),
    );
    add(
        "safetensors/trailing_bytes",
        "TrailingBytes",
        &["found 1 bytes"],
        changed(&|f| f.data.push(0)),
    );
    add(
        "safetensors/last_byte_missing",
        "TensorOutOfBounds",
        &["`b`", "the file has"],
        changed(&|f| f.data.truncate(63)),
    );
    let spaces = (8 << 20) - control.len() + 8 + 64;
    let padded = |n: usize| {
        let mut file = RawSafeTensors::valid();
        file.header.resize(file.header.len() + n, b' ');
        file.bytes()
    };
    single(
        out,
        "safetensors/header_beyond_the_limit",
        "HeaderTooLarge",
        &["8388609", "the limit is 8388608"],
        NAME,
        padded(spaces),
        padded(spaces + 1),
    );
}

fn hugging_face(out: &mut Vec<Hostile>) {
    const INDEX: &str = "model.safetensors.index.json";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let control = TinyLlama::small().hugging_face_sharded(Encoding::F16);
    let mut add = |name, error, says, model| {
        out.push(Hostile {
            name,
            model,
            control: control.clone(),
            error,
            says,
        });
    };
    let index = |from: &str, to: &str| replaced(&control, INDEX, from, to);
    add(
        "hugging_face/folder_without_config",
        "FolderWithoutModel",
        &["`config.json`"],
        without(&control, "config.json"),
    );
    add(
        "hugging_face/folder_without_weights",
        "FolderWithoutModel",
        &["`model.safetensors`"],
        without(&control, INDEX),
    );
    add(
        "hugging_face/missing_shard",
        "MissingShard",
        &["index.json", "model-00002-of-00002.safetensors"],
        without(&control, SECOND),
    );
    add(
        "hugging_face/empty_shard",
        "Empty",
        &[SECOND],
        changed(&control, SECOND, Vec::clear),
    );
    add(
        "hugging_face/empty_config",
        "Empty",
        &["config.json"],
        changed(&control, "config.json", Vec::clear),
    );
    add(
        "hugging_face/config_that_is_not_json",
        "Json",
        &["config.json", "EOF"],
        changed(&control, "config.json", |b| b.truncate(b.len() - 1)),
    );
    add(
        "hugging_face/config_key_twice",
        "DuplicateKey",
        &["config.json", "`hidden_size`"],
        replaced(&control, "config.json", "{", r#"{"hidden_size":1,"#),
    );
    add(
        "hugging_face/no_weight_map",
        "Json",
        &["weight_map"],
        index("weight_map", "weight_mop"),
    );
    add(
        "hugging_face/tensor_twice",
        "DuplicateTensor",
        &["`model.norm.weight`"],
        index(
            r#""weight_map":{"#,
            r#""weight_map":{"model.norm.weight":"model-00001-of-00002.safetensors","#,
        ),
    );
    add(
        "hugging_face/tensor_in_another_shard",
        "ShardMismatch",
        &[
            "`model.norm.weight`",
            "expected model-00001-of-00002.safetensors",
            "found model-00002-of-00002.safetensors",
        ],
        index(
            r#""model.norm.weight":"model-00002-of-00002.safetensors""#,
            r#""model.norm.weight":"model-00001-of-00002.safetensors""#,
        ),
    );
    add(
        "hugging_face/tensor_in_no_shard",
        "ShardMismatch",
        &["`model.norn.weight`", "found nowhere"],
        index("model.norm.weight", "model.norn.weight"),
    );
    add(
        "hugging_face/shard_outside_the_folder",
        "ShardMismatch",
        &["../model-00002-of-00002.safetensors", "without a path"],
        index(SECOND, "../model-00002-of-00002.safetensors"),
    );
    add(
        "hugging_face/absolute_shard",
        "ShardMismatch",
        &["/etc/passwd", "without a path"],
        index(SECOND, "/etc/passwd"),
    );
    // Both names of the set, but only one of its files.
    let renamed = changed(&control, INDEX, |b| {
        let text = std::str::from_utf8(b).expect("a text file");
        *b = text.replace("-of-00002", "-of-00003").into_bytes();
    });
    add(
        "hugging_face/wrong_shard_count",
        "ShardMismatch",
        &["the number of shards", "expected 3", "found 2"],
        renamed,
    );
    add(
        "hugging_face/tensor_in_two_shards",
        "DuplicateTensor",
        &["`model.layers.0.self_attn.q_proj.weight`"],
        {
            // The second shard's last name becomes one of the first's; the index no longer lists the old one.
            let small = TinyLlama::small();
            let mut tensors = small.tensors();
            let half = tensors.len() / 2;
            let q = tensors[2].hf_name.clone();
            let old = std::mem::replace(&mut tensors[half + 1].hf_name, q.clone());
            let bytes = TinyLlama::safetensors_of(&tensors[half..], Encoding::F16);
            let model = changed(&control, SECOND, |b| *b = bytes);
            // Without an entry for `q` there is no telling which shard is right.
            let one = format!(r#""{q}":"model-00001-of-00002.safetensors","#);
            let two = format!(r#""{old}":"model-00002-of-00002.safetensors","#);
            replaced(&replaced(&model, INDEX, &one, ""), INDEX, &two, "")
        },
    );
}

fn apr(out: &mut Vec<Hostile>) {
    const NAME: &str = "model.apr";
    let mut add = |name, error, says, change: &dyn Fn(&mut RawApr)| {
        let mut file = RawApr::valid();
        change(&mut file);
        single(
            out,
            name,
            error,
            says,
            NAME,
            RawApr::valid().bytes(),
            file.bytes(),
        );
    };
    fn flag(header: &mut AprV2Header, flag: u16) {
        header.flags = header.flags.with(flag);
    }
    add("apr/magic", "WrongMagic", &["APX", "APR"], &|f| {
        f.header.magic = *b"APX\0";
    });
    add("apr/version_1", "UnsupportedVersion", &["APRN", "2.0"], &|f| {
        f.header.magic = *b"APRN";
    });
    add("apr/version_3", "UnsupportedVersion", &["3.0", "2.0"], &|f| {
        f.header.version = (3, 0);
    });
    add(
        "apr/header_checksum",
        "Checksum",
        &["the header", "CRC32"],
        &|f| f.keep_checksum = true,
    );
    add("apr/encrypted", "Encrypted", &["encrypted"], &|f| {
        flag(&mut f.header, AprV2Flags::ENCRYPTED);
    });
    add("apr/zstandard", "UnsupportedCompression", &["Zstandard"], &|f| {
        flag(&mut f.header, AprV2Flags::ZSTD_COMPRESSED);
    });
    add(
        "apr/column_major",
        "InvalidField",
        &["flags", "row-major"],
        &|f| {
            flag(&mut f.header, AprV2Flags::LAYOUT_COLUMN_MAJOR);
        },
    );
    add(
        "apr/tensor_count_of_2_32",
        "CountTooLarge",
        &["the number of tensors", "at byte 8", "4294967295"],
        &|f| f.header.tensor_count = u32::MAX,
    );
    add(
        "apr/tensor_count_beyond_the_entries",
        "EmptyName",
        &["tensor 2"],
        &|f| {
            f.header.tensor_count = 3;
        },
    );
    add(
        "apr/metadata_offset_of_2_63",
        "InvalidField",
        &["the offset of the tensor index", "at byte 24"],
        &|f| f.header.metadata_offset = HUGE,
    );
    add(
        "apr/metadata_in_the_header",
        "InvalidField",
        &[
            "the offset of the metadata",
            "at byte 12",
            "at least 64",
            "found 4",
        ],
        &|f| f.header.metadata_offset = 4,
    );
    add(
        "apr/metadata_size_of_2_32",
        "InvalidField",
        &["the offset of the tensor index"],
        &|f| f.header.metadata_size = u32::MAX,
    );
    add(
        "apr/index_offset_of_2_63",
        "InvalidField",
        &["the offset of the tensor data"],
        &|f| {
            f.header.tensor_index_offset = HUGE;
        },
    );
    add("apr/data_offset_of_2_63", "Truncated", &["the file has"], &|f| {
        f.header.data_offset = HUGE;
    });
    add(
        "apr/data_offset_misaligned",
        "InvalidField",
        &["the offset of the tensor data", "multiple of 64"],
        &|f| {
            f.header.data_offset = 257;
        },
    );
    add(
        "apr/metadata_that_is_not_json",
        "Json",
        &["the JSON metadata"],
        &|f| {
            f.metadata[0] = b'[';
        },
    );
    add(
        "apr/metadata_key_twice",
        "DuplicateKey",
        &["`architecture`"],
        &|f| {
            f.metadata = br#"{"architecture":"llama","architecture":"gpt2"}"#.to_vec();
        },
    );
    add(
        "apr/metadata_that_is_not_utf_8",
        "NotUtf8",
        &["the JSON metadata"],
        &|f| {
            f.metadata[3] = 0xff;
        },
    );
    add("apr/tensor_twice", "DuplicateTensor", &["`a`"], &|f| {
        f.entries[1].name = b"a".to_vec();
    });
    add(
        "apr/names_out_of_order",
        "InvalidField",
        &["ascending order", "`a` after `b`"],
        &|f| {
            f.entries.swap(0, 1);
        },
    );
    add(
        "apr/name_that_is_not_utf_8",
        "NotUtf8",
        &["the name of tensor 1"],
        &|f| {
            f.entries[1].name = b"\xff".to_vec();
        },
    );
    add("apr/empty_name", "EmptyName", &["tensor 0"], &|f| {
        f.entries[0].name.clear();
    });
    add(
        "apr/name_of_257_bytes",
        "InvalidField",
        &["the length of the name of tensor 1", "at most 256", "found 257"],
        &|f| f.entries[1].name = vec![b'b'; 257],
    );
    add(
        "apr/id_of_ggml_only",
        "UnknownEncoding",
        &["`a`", "APR", "id 2"],
        &|f| f.entries[0].dtype = 2,
    );
    add("apr/unknown_id", "UnknownEncoding", &["`a`", "id 99"], &|f| {
        f.entries[0].dtype = 99;
    });
    add(
        "apr/nine_dimensions",
        "InvalidRank",
        &["`a`", "at most 8", "found 9"],
        &|f| {
            f.entries[0].dims = vec![1, 1, 1, 1, 1, 1, 1, 2, 32];
        },
    );
    add("apr/zero_dimension", "ZeroDimension", &["`a`", "[0, 32]"], &|f| {
        f.entries[0].dims[0] = 0;
    });
    add(
        "apr/dimensions_whose_product_overflows",
        "ShapeOverflow",
        &["`a`", "f32"],
        &|f| {
            f.entries[0].dims = vec![1 << 32, 1 << 32];
        },
    );
    add(
        "apr/size_that_is_not_the_shape_s",
        "SizeMismatch",
        &["`a`", "expected 256", "found 255"],
        &|f| f.entries[0].size = 255,
    );
    add(
        "apr/size_of_2_63",
        "SizeMismatch",
        &["`a`", "9223372036854775808"],
        &|f| {
            f.entries[0].size = HUGE;
        },
    );
    add(
        "apr/misaligned_offset",
        "Misaligned",
        &["`b`", "multiple of 64", "found 257"],
        &|f| {
            f.entries[1].offset = 257;
        },
    );
    add(
        "apr/offset_beyond_the_end",
        "TensorOutOfBounds",
        &["`b`", "the file has"],
        &|f| {
            f.entries[1].offset = 512;
        },
    );
    add("apr/offset_near_2_64", "TensorOutOfBounds", &["`b`"], &|f| {
        f.entries[1].offset = u64::MAX - 63;
    });
    add("apr/overlap", "Overlap", &["`a`", "`b`"], &|f| {
        f.entries[1].offset = 192;
    });
    add("apr/part_of_a_footer", "Truncated", &["the footer"], &|f| {
        f.footer = Some(vec![0; 2]);
    });
    add("apr/trailing_bytes", "TrailingBytes", &["found 1 bytes"], &|f| {
        f.footer = Some(vec![0; 5]);
    });
    add(
        "apr/legacy_apr_q4_that_splits_a_block",
        "PartialBlock",
        &["`a`", "apr_q4", "found 33"],
        &|f| {
            f.entries[0] = RawAprEntry {
                name: b"a".to_vec(),
                dtype: 8,
                dims: vec![2, 33],
                offset: 0,
                size: 54,
            };
        },
    );

    let small = TinyLlama::small();
    let raw = small.apr_lz4_flag(AprStorage::F16);
    let block = small.apr_lz4_block(AprStorage::F16);
    let mut lz4 = |name, says, control: &Vec<u8>, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bad = control.clone();
        change(&mut bad);
        single(out, name, "Lz4", says, NAME, control.clone(), bad);
    };
    lz4(
        "apr/lz4_raw_that_is_cut",
        &["LZ4", "read as raw data", "the file has"],
        &raw,
        &|b| {
            b.truncate(b.len() - 100);
        },
    );
    lz4(
        "apr/lz4_block_that_is_cut",
        &["read as one LZ4 block", "the LZ4 block"],
        &block,
        &|b| {
            b.truncate(b.len() - 1);
        },
    );
    lz4(
        "apr/lz4_block_with_a_byte_more",
        &["read as one LZ4 block"],
        &block,
        &|b| b.push(0),
    );
    lz4(
        "apr/lz4_block_of_4_gib",
        &["the decompressed size", "4294967295", "at most"],
        &block,
        &|b| {
            b[64..68].copy_from_slice(&u32::MAX.to_le_bytes());
        },
    );
    lz4(
        "apr/lz4_block_of_a_byte_less",
        &["read as one LZ4 block"],
        &block,
        &|b| {
            let size = u32::from_le_bytes([b[64], b[65], b[66], b[67]]) - 1;
            b[64..68].copy_from_slice(&size.to_le_bytes());
        },
    );
    lz4(
        "apr/lz4_block_of_no_sense",
        &["read as one LZ4 block"],
        &block,
        &|b| b[68..].fill(0),
    );
    lz4(
        "apr/lz4_block_with_a_wrong_footer",
        &["the footer", "CRC32"],
        &block,
        &|b| {
            let len = b.len();
            b[len - 1] ^= 1;
        },
    );
    let mut shard = RawApr::valid();
    shard.metadata = br#"{"sharding":{"shard_count":2,"shard_index":0,"total_size":0}}"#.to_vec();
    let alone = shard.bytes();
    shard.metadata = br#"{"sharding":{"shard_count":1,"shard_index":0,"total_size":0}}"#.to_vec();
    single(
        out,
        "apr/one_shard_of_two",
        "OneShardOfMany",
        &["one of 2 shards", "manifest"],
        NAME,
        shard.bytes(),
        alone,
    );
    single(
        out,
        "apr/empty_file",
        "Empty",
        &["is empty"],
        NAME,
        RawApr::valid().bytes(),
        Vec::new(),
    );
}

fn apr_shards(out: &mut Vec<Hostile>) {
    const MANIFEST: &str = "tiny.shards.json";
    const FIRST: &str = "tiny-00000-of-00002.apr";
    const SECOND: &str = "tiny-00001-of-00002.apr";
    let control = TinyLlama::small().apr_sharded(AprStorage::F16, 2);
    let mut add = |name, error, says, model| {
        out.push(Hostile {
            name,
            model,
            control: control.clone(),
            error,
            says,
        });
    };
    let manifest = |from: &str, to: &str| replaced(&control, MANIFEST, from, to);
    add(
        "apr_shards/missing_shard",
        "MissingShard",
        &[MANIFEST, SECOND],
        without(&control, SECOND),
    );
    add(
        "apr_shards/duplicate_shard",
        "ShardMismatch",
        &["a file of its own", FIRST],
        manifest(SECOND, FIRST),
    );
    add(
        "apr_shards/wrong_shard_count",
        "ShardMismatch",
        &["`shard_count`", "expected 3", "found 2"],
        manifest(r#""shard_count": 2"#, r#""shard_count": 3"#),
    );
    add(
        "apr_shards/index_twice",
        "ShardMismatch",
        &["the index of shard", "expected 1", "found 0"],
        manifest(r#""index": 1"#, r#""index": 0"#),
    );
    add(
        "apr_shards/wrong_size",
        "ShardMismatch",
        &[SECOND, "size in bytes"],
        changed(&control, SECOND, |b| b.truncate(b.len() - 4)),
    );
    add(
        "apr_shards/shards_swapped",
        "ShardMismatch",
        &["its metadata", "shard 0 of 2", "shard 1 of 2"],
        {
            let mut model = control.clone();
            model.files[0].0 = SECOND.into();
            model.files[1].0 = FIRST.into();
            let sizes = [model.files[0].1.len(), model.files[1].1.len()].map(|n| format!(r#""size": {n}"#));
            let model = replaced(&model, MANIFEST, &sizes[0], "\u{1}");
            let model = replaced(&model, MANIFEST, &sizes[1], &sizes[0]);
            replaced(&model, MANIFEST, "\u{1}", &sizes[1])
        },
    );
    add(
        "apr_shards/wrong_tensor_count",
        "ShardMismatch",
        &["`tensor_count`", "expected 12", "found 11"],
        manifest(r#""tensor_count": 11"#, r#""tensor_count": 12"#),
    );
    add(
        "apr_shards/tensor_that_is_not_listed",
        "ShardMismatch",
        &["`model.norm.weight` too"],
        manifest(r#""model.norm.weight""#, r#""model.norn.weight""#),
    );
    add(
        "apr_shards/tensor_in_another_shard",
        "ShardMismatch",
        &["`model.norm.weight`", "expected 1", "found 0"],
        manifest(r#""model.norm.weight": 1"#, r#""model.norm.weight": 0"#),
    );
    add(
        "apr_shards/shard_outside_the_folder",
        "ShardMismatch",
        &["without a path"],
        manifest(SECOND, "../tiny-00001-of-00002.apr"),
    );
    add(
        "apr_shards/manifest_of_another_version",
        "UnsupportedVersion",
        &["3.0", "2.0"],
        manifest(r#""version": "2.0""#, r#""version": "3.0""#),
    );
    add(
        "apr_shards/manifest_that_is_cut",
        "Json",
        &["EOF"],
        changed(&control, MANIFEST, |b| b.truncate(b.len() - 1)),
    );
}
