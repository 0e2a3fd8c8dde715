//! Names of the kernels of each encoding, and the kernels of a program, looked up once.

use hoist_backend::{Encoding, Error, FloatLayout, Result, UnsupportedWhat};

macro_rules! by_encoding {
    ($($encoding:ident $name:literal),* $(,)?) => {
        /// The kernels of a quantised encoding: product and embedding.
        fn quantised(encoding: Encoding) -> Option<(&'static str, &'static str)> {
            Some(match encoding {
                $(Encoding::$encoding => (concat!("matmul_", $name), concat!("embed_", $name)),)*
                _ => return None,
            })
        }
    };
}

by_encoding! {
    Q4_0 "q4_0", Q4_1 "q4_1", Q5_0 "q5_0", Q5_1 "q5_1", Q8_0 "q8_0", Q2_K "q2_k", Q3_K "q3_k", Q4_K "q4_k", Q5_K "q5_k",
    Q6_K "q6_k", IQ2_XXS "iq2_xxs", IQ2_XS "iq2_xs", IQ3_XXS "iq3_xxs", IQ1_S "iq1_s", IQ4_NL "iq4_nl", IQ3_S "iq3_s",
    IQ2_S "iq2_s", IQ4_XS "iq4_xs", IQ1_M "iq1_m", TQ1_0 "tq1_0", TQ2_0 "tq2_0", MXFP4 "mxfp4", NVFP4 "nvfp4",
    Q1_0 "q1_0", Q2_0 "q2_0", APR_Q4 "apr_q4", APR_Q8 "apr_q8",
}

/// Whether there are kernels for an encoding.
pub(crate) fn computes(encoding: Encoding) -> bool {
    encoding.is_float() || quantised(encoding).is_some()
}

fn unsupported(encoding: Encoding, usage: &'static str) -> Error {
    Error::Unsupported {
        backend: crate::NAME.into(),
        what: UnsupportedWhat::Encoding { encoding, usage },
    }
}

/// The file and name of the kernel that multiplies with a matrix.
pub(super) fn matmul(encoding: Encoding, layout: FloatLayout) -> Result<(&'static str, &'static str)> {
    let float = match (encoding, layout) {
        (Encoding::F32, FloatLayout::OutIn) => "matmul_f32",
        (Encoding::F16, FloatLayout::OutIn) => "matmul_f16",
        (Encoding::BF16, FloatLayout::OutIn) => "matmul_bf16",
        (Encoding::F32, FloatLayout::InOut) => "columns_f32",
        (Encoding::F16, FloatLayout::InOut) => "columns_f16",
        (Encoding::BF16, FloatLayout::InOut) => "columns_bf16",
        _ => {
            let (product, _) =
                quantised(encoding).ok_or_else(|| unsupported(encoding, "matrix multiplication"))?;
            return Ok(("matmul", product));
        }
    };
    Ok(("decode", float))
}

/// The kernel that reads rows of a matrix.
pub(super) fn embed(encoding: Encoding) -> Result<&'static str> {
    Ok(match encoding {
        Encoding::F32 => "embed_f32",
        Encoding::F16 => "embed_f16",
        Encoding::BF16 => "embed_bf16",
        // The scale stands in front of the matrix.
        Encoding::APR_Q8 => "embed_apr_q8_scaled",
        _ => {
            quantised(encoding)
                .ok_or_else(|| unsupported(encoding, "embedding rows"))?
                .1
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_of_weights_has_kernels() {
        for encoding in Encoding::all().filter(|e| e.is_float() || e.is_quantized()) {
            assert!(computes(encoding), "{encoding}");
            let (_, product) = matmul(encoding, FloatLayout::OutIn).unwrap();
            assert_eq!(product, format!("matmul_{encoding}"));
            let row = embed(encoding).unwrap();
            assert!(row.starts_with(&format!("embed_{encoding}")), "{row}");
        }
        assert!(matmul(Encoding::Q8_K, FloatLayout::OutIn).is_err());
        assert!(embed(Encoding::F64).is_err());
    }
}
