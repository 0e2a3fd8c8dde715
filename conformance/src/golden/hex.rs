//! Operands as hexadecimal strings of little-endian bytes.

use std::ops::Deref;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

macro_rules! hex_operand {
    ($(#[doc = $doc:literal])* $name:ident, $element:ty, $from:expr) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name(pub Vec<$element>);

        impl Deref for $name {
            type Target = [$element];

            fn deref(&self) -> &[$element] {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                let bytes = bytes(&text).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
                let (elements, rest) = bytes.as_chunks();
                if !rest.is_empty() {
                    return Err(D::Error::custom("a number is cut off"));
                }
                Ok(Self(elements.iter().map(|b| $from(*b)).collect()))
            }
        }
    };
}

hex_operand!(
    /// f32 values.
    F32s, f32, f32::from_le_bytes
);
hex_operand!(
    /// f16 bit patterns.
    F16s, u16, u16::from_le_bytes
);
hex_operand!(
    /// Bytes.
    Bytes, u8, u8::from_le_bytes
);

fn bytes(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| {
            let digit = |c: u8| char::from(c).to_digit(16);
            u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()
        })
        .collect()
}
