//! §4: RmsNorm and LayerNorm.

use hoist_backend::Result;

use super::deviation::by_contract;
use super::float::{sum256, sum256_of_squares};
use super::same_length;

/// The operation RmsNorm, of one vector. `gamma`: as long as `x`.
///
/// # Errors
/// [`hoist_backend::Error::InvalidArgument`] for unequal lengths.
pub fn rms_norm(x: &[f32], gamma: &[f32], eps: f32) -> Result<Vec<f32>> {
    same_length("norm vector", x.len(), gamma.len())?;
    let n = x.len() as f32;
    let ss = sum256_of_squares(x);
    let mean = by_contract!(ss / n, RmsMeanByReciprocal => ss * (1.0 / n));
    let inv = by_contract!(1.0 / (mean + eps).sqrt(), RmsEpsilonOutside => 1.0 / (mean.sqrt() + eps));
    Ok(x.iter()
        .zip(gamma)
        .map(|(x, g)| by_contract!((x * inv) * g, RmsGammaFirst => x * (inv * g)))
        .collect())
}

/// The operation LayerNorm, of one vector. `gamma`, `bias`: as long as `x`.
///
/// # Errors
/// As [`rms_norm`].
pub fn layer_norm(x: &[f32], gamma: &[f32], bias: &[f32], eps: f32) -> Result<Vec<f32>> {
    same_length("norm vector", x.len(), gamma.len())?;
    same_length("norm bias", x.len(), bias.len())?;
    let n = x.len() as f32;
    let mean = sum256(x) / n;
    let centred: Vec<f32> = x.iter().map(|x| x - mean).collect();
    let var = by_contract!(
        sum256_of_squares(&centred) / n,
        LayerNormOnePass => sum256_of_squares(x) / n - mean * mean
    );
    let inv = 1.0 / (var + eps).sqrt();
    Ok(centred
        .iter()
        .zip(gamma.iter().zip(bias))
        .map(|(c, (g, b))| {
            by_contract!(
                (c * inv).mul_add(*g, *b),
                LayerNormWithoutFma => c * inv * g + b
            )
        })
        .collect())
}
